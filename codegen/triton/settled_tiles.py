"""Settled vectors as attention reads them: a tile of codes becomes a tile of numbers in the type of the queries.

Numbers of one channel that share a scale are tokens, those of one token are channels, and groups are small: so scales meet the codes, not
the scores. A tile has its codes in order, [BLOCK_T, BLOCK_D] per token or [BLOCK_D, BLOCK_T] per channel, so that it is multiplied as one
that was never packed. A code in the low bits of 2^23 is 2^23 plus the code: no conversion instruction.
"""

from __future__ import annotations

from qcompile.codegen.triton.cache_tiles import KeyTile, Sum, Tiles, ValueTile, plain_tiles
from qcompile.codegen.triton.elements import element_float32
from qcompile.codegen.triton.settled_form import Packed
from qcompile.codegen.triton.source import Lines, load
from qcompile.codegen.triton.tiles import power_of_two
from qcompile.quant.element import FP8

CODE_BASE, CODE_PATTERN = float(1 << 23), "0x4B000000"
"""2^23, and its bits as float32."""


def settled_tiles(keys: Packed, values: Packed, kind: str, step: int) -> Tiles:
    """Keys and values that are packed, `step` tokens at a time; queries, sums and numbers are those of tiles that came in 16 bits."""
    plain = plain_tiles(kind, step)
    score = [*tile_lines(keys, "keys", kind, step), f"score = tl.dot(query, {turned(keys, keys.per_channel)})"]
    mix = [
        *tile_lines(values, "values", kind, step),
        f"mixed = tl.dot(weight.to({kind}), {turned(values, not values.per_channel)}, mixed * decay[:, None])",
    ]
    sums = (Sum("mixed", "dim", "dim < D"),)
    together = max(keys.form.tokens, values.form.tokens)  # both are powers of two
    return Tiles(KeyTile(plain.keys.query, score), ValueTile(plain.values.zeros, mix, sums, []), step, plain.channels, together)


def turned(form: Packed, fits: bool) -> str:
    """The tile as a product wants it."""
    tile = f"{form.name.lower()}_tile"
    return tile if fits else f"tl.trans({tile})"


def tile_lines(form: Packed, source: str, kind: str, step: int) -> Lines:
    """`NAME_tile` in the type `kind` of the tokens in the slots `place`, those that are `present`."""
    return channel_lines(form, source, kind, step) if form.per_channel else token_lines(form, source, kind)


def number_lines(form: Packed, codes: str, kind: str, spread: str) -> Lines:
    """`NAME_tile` of `codes` whose scales broadcast by `spread`."""
    name = form.name.lower()
    least = "" if form.form.symmetric else f" + {name}_least{spread}"
    wide = f"{codes}.to(tl.uint32)"
    integer = f"({wide} | {CODE_PATTERN}).to(tl.float32, bitcast=True) - {CODE_BASE + form.zero}"
    return [
        f"{name}_numbers = {element_float32('fp8', wide) if form.form.element == FP8 else integer}",
        f"{name}_tile = ({name}_numbers * {name}_scale{spread}{least}).to({kind})",
    ]


def code_lines(form: Packed, rows: str, columns: str) -> Lines:
    """`NAME_codes` [rows, columns] of the bytes `NAME_items` [rows, columns / PER]."""
    name = form.name.lower()
    if form.per_byte == 1:
        return [f"{name}_codes = {name}_items"]
    bits, mask = form.form.element.bits, (1 << form.form.element.bits) - 1
    parts = [f"({name}_items >> {bits * place}) & {mask}" for place in range(form.per_byte)]
    return [f"{name}_codes = tl.reshape({joined(parts)}, [{rows}, {columns}])"]


def joined(parts: list[str]) -> str:
    """Expressions put side by side along new last axes, so that a reshape of these leaves the first, the second … of each number."""
    return parts[0] if len(parts) == 1 else f"tl.join({joined(parts[::2])}, {joined(parts[1::2])})"


def scale_lines(form: Packed, source: str, cell: str, index: str, mask: str) -> Lines:
    """`NAME_scale` and, where there are least values, `NAME_least`, float32, at `index` of the bytes at `cell`."""
    name = form.name.lower()
    lines = [f"{name}_half = ({source} + {cell} + {form.constant('BODY')}).to(tl.pointer_type(tl.float16)) + {index}"]
    parts = (("scale", ""),) if form.form.symmetric else (("scale", ""), ("least", f" + {form.constant('GROUPS')}"))
    for part, offset in parts:
        lines += load(f"{name}_{part}", f"{name}_half{offset}", mask, suffix=".to(tl.float32)")
    return lines


def token_lines(form: Packed, source: str, kind: str) -> Lines:
    """Tokens with groups of channels: a token's groups stand side by side, each with its scale."""
    name, size = form.name.lower(), form.size
    block = max(16, power_of_two(size))
    groups = 1 if form.groups == 1 else block // form.group
    mask = f"present[:, None] & ({name}_byte < {size // form.per_byte})[None, :]"
    lines = [
        f"{name}_cell = slot * {form.constant('BYTES')}",
        f"{name}_byte = tl.arange(0, {block // form.per_byte})",
        *load(f"{name}_items", f"{source} + {name}_cell[:, None] + {name}_byte[None, :]", mask, "0"),
        *code_lines(form, "BLOCK_T", "BLOCK_D"),
        f"{name}_group = tl.arange(0, {groups})[None, :]",
        *scale_lines(
            form, source, f"{name}_cell[:, None]", f"{name}_group", f"present[:, None] & ({name}_group < {form.constant('GROUPS')})"
        ),
    ]
    if groups == 1:
        return [*lines, *number_lines(form, f"{name}_codes", kind, "")]
    cut = f"tl.reshape({name}_codes, [BLOCK_T, {groups}, {form.group}])"
    return [*lines, *number_lines(form, cut, kind, "[:, :, None]"), f"{name}_tile = tl.reshape({name}_tile, [BLOCK_T, BLOCK_D])"]


def channel_lines(form: Packed, source: str, kind: str, step: int) -> Lines:
    """Channels with groups of tokens: the step's groups of a channel stand side by side; a longer group is read in part."""
    name, tokens, per = form.name.lower(), form.form.tokens, form.per_byte
    held = min(tokens, step)
    offset = f"start % {tokens} // {per} + " if tokens > step else ""
    at = f"{source} + {name}_cell[None, :, None] + dim[:, None, None] * {tokens // per} + {name}_byte[None, None, :]"
    lines = [
        f"{name}_first = (start // {tokens} + tl.arange(0, {step // held})) * {tokens}",
        f"{name}_there = {name}_first < last",
        *load(f"{name}_page", f"page_table + batch * pages + {name}_first // page_tokens", f"{name}_there", "0", ".to(tl.int64)"),
        f"{name}_cell = (({name}_page * L + head) * page_tokens + {name}_first % page_tokens) * {form.constant('BYTES')}",
        f"{name}_byte = {offset}tl.arange(0, {held // per})",
        *load(f"{name}_items", at, f"{name}_there[None, :, None] & (dim < D)[:, None, None]", "0"),
        f"{name}_items = tl.reshape({name}_items, [BLOCK_D, {step // per}])",
        *code_lines(form, "BLOCK_D", "BLOCK_T"),
        *scale_lines(form, source, f"{name}_cell[None, :]", "dim[:, None]", f"{name}_there[None, :] & (dim < D)[:, None]"),
    ]
    cut = f"tl.reshape({name}_codes, [BLOCK_D, {step // held}, {held}])"
    return [*lines, *number_lines(form, cut, kind, "[:, :, None]"), f"{name}_tile = tl.reshape({name}_tile, [BLOCK_D, BLOCK_T])"]
