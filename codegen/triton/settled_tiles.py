"""Settled vectors as attention reads them: a tile of codes becomes a tile of numbers in float16.

Numbers of one channel that share a scale are tokens, those of one token are channels, and groups are small: so scales meet the codes, not
the scores. A tile has its codes in order, [BLOCK_T, BLOCK_D] per token or [BLOCK_D, BLOCK_T] per channel, so that it is multiplied as one
that was never packed.

Scales and least values are float16, and a code in the low bits of 1024 (0x6400) is that number plus the code: so a number is one masked
code, one difference, which is exact, and one fused multiplication, two numbers at a time. Queries in bfloat16 are float16 too once a power
of two, the same for a line, is taken out of them.

Blocks that share a power of two are read part by part, as where all tokens are packed (`block_vectors.py`); what is kept is then read in
these parts too, so that it meets the same queries and is added to the same sums.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from qcompile.codegen.triton.block_vectors import BlockVectors, block_keys, block_values, kept_keys, kept_values
from qcompile.codegen.triton.cache_tiles import KeyTile, Tiles, ValueTile, plain_tiles
from qcompile.codegen.triton.contract import TRITON_TYPES
from qcompile.codegen.triton.packed_forms import KEY_ORDER, VALUE_ORDER
from qcompile.codegen.triton.settled_form import Packed, SettledForm
from qcompile.codegen.triton.source import Lines, load
from qcompile.codegen.triton.tiles import power_of_two
from qcompile.quant.element import FP8

CODE_BASE, CODE_PATTERN = 1024.0, "0x6400"
"""A float16 with room for ten bits, and its own bits."""
MOST_BYTES = 4
"""Of a word."""
LEAST_REACH = 2.0**-100
"""Of a line's queries: less is taken for nothing."""


def settled_tiles(keys: SettledForm, values: SettledForm, kind: str, step: int) -> Tiles:
    """Keys and values that are packed, `step` tokens at a time, for queries of the 16-bit type `kind` (bf16, fp16).

    Where tokens lie together a step is no longer than these: all of it is settled, and lies in one page. Else `present` says which tokens
    are there. `first_slot` is the number of a place in all pages, `row` [BLOCK_T] how far from there each token is.
    """
    together = max(keys.form.tokens, values.form.tokens)  # both are powers of two
    present = "present" if together == 1 else ""
    plain = plain_tiles(TRITON_TYPES[kind], step)
    return Tiles(
        block_keys(keys, kind, KEY_ORDER) if isinstance(keys, BlockVectors) else settled_keys(keys, plain, kind, present),
        # Kept values are added up in the same sums: their channels are known before (`kept_tiles`).
        replace(block_values(values, kind, VALUE_ORDER), finish=[])
        if isinstance(values, BlockVectors)
        else settled_values(values, plain, present),
        step,
        [] if isinstance(keys, BlockVectors) and isinstance(values, BlockVectors) else plain.channels,
        together,
    )


def kept_tiles(keys: SettledForm, values: SettledForm, kind: str, step: int) -> Tiles:
    """Keys and values that are kept as they came, with the queries and the sums of `settled_tiles`; `channels` go before the loop."""
    sources = ("exact_keys", "exact_values")
    plain = plain_tiles(TRITON_TYPES[kind], step, sources, f".to({TRITON_TYPES[kind]})")
    score = kept_keys(keys, kind, KEY_ORDER) if isinstance(keys, BlockVectors) else plain.keys.score
    if not isinstance(values, BlockVectors):
        return Tiles(KeyTile([], score), plain.values, step)
    packed = block_values(values, kind, VALUE_ORDER)
    return Tiles(KeyTile([], score), replace(packed, mix=kept_values(values, kind, VALUE_ORDER)), step, packed.finish)


def settled_keys(keys: Packed, plain: Tiles, kind: str, present: str) -> KeyTile:
    """Keys with scales; `query` is that of `plain` tiles."""
    query, times = ("query", "") if kind == "fp16" else ("half_query", " * reach[:, None]")
    score = [*tile_lines(keys, "keys", plain.step, present), f"score = tl.dot({query}, {turned(keys, keys.per_channel)}){times}"]
    return KeyTile([*plain.keys.query, *half_query_lines(kind)], score)


def settled_values(values: Packed, plain: Tiles, present: str) -> ValueTile:
    """Values with scales; the sums are those of `plain` tiles."""
    mix = [
        *tile_lines(values, "values", plain.step, present),
        f"mixed = tl.dot(weight.to(tl.float16), {turned(values, not values.per_channel)}, mixed * decay[:, None])",
    ]
    return replace(plain.values, mix=mix)


def half_query_lines(kind: str) -> Lines:
    """`half_query`, the queries over `reach`, a power of two as large as the largest of a line: exact but for what is 2^-14 of that."""
    if kind == "fp16":
        return []
    return [
        "wide_query = query.to(tl.float32)",
        f"largest = tl.maximum(tl.max(tl.abs(wide_query), axis=1), {LEAST_REACH!r})",
        "reach = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)",
        "half_query = (wide_query / reach[:, None]).to(tl.float16)",
    ]


def turned(form: Packed, fits: bool) -> str:
    """The tile as a product wants it."""
    tile = f"{form.name.lower()}_tile"
    return tile if fits else f"tl.trans({tile})"


def tile_lines(form: Packed, source: str, step: int, present: str) -> Lines:
    """`NAME_tile` float16 of the tokens of a step."""
    return channel_lines(form, source, step) if form.per_channel else token_lines(form, source, present)


def word_bytes(form: Packed) -> int:
    """Bytes that are taken apart at once: whole words of them hold codes that lie together, and tokens begin where a word may."""
    run = form.form.tokens if form.per_channel else form.size
    return gcd(run // form.per_byte, form.form.tokens * form.form.width(form.size), MOST_BYTES)


def number_lines(form: Packed, rows: str, columns: str) -> Lines:
    """`NAME_numbers` [rows, columns], codes less their zero point as float16, of the words `NAME_items`, in which low bits come first."""
    name, bits = form.name.lower(), form.form.element.bits
    places = range(0, 8 * word_bytes(form), bits)
    parts = [f"{name}_{place}" for place in range(len(places))]
    return [
        f"{name}_items = {name}_items.to(tl.uint32)",
        *(f"{part} = {number(form, f'(({name}_items >> {low}) & {(1 << bits) - 1})')}" for part, low in zip(parts, places, strict=True)),
        f"{name}_numbers = tl.reshape({joined(parts)}, [{rows}, {columns}])",
    ]


def number(form: Packed, code: str) -> str:
    """The number of a code, a uint32."""
    if form.form.element == FP8:
        return f"((({code} & 127) << 7) | (({code} & 128) << 8)).to(tl.uint16).to(tl.float16, bitcast=True) * 256.0"
    return f"({code} | {CODE_PATTERN}).to(tl.uint16).to(tl.float16, bitcast=True) - {CODE_BASE + form.zero}"


def scaled(form: Packed, spread: str) -> str:
    """`NAME_tile` of `NAME_numbers` whose scales broadcast by `spread`."""
    name = form.name.lower()
    least = "" if form.form.symmetric else f" + {name}_least{spread}"
    return f"{name}_tile = {name}_numbers * {name}_scale{spread}{least}"


def joined(parts: list[str]) -> str:
    """Expressions put side by side along new last axes, so that a reshape of these leaves the first, the second … of each number."""
    return parts[0] if len(parts) == 1 else f"tl.join({joined(parts[::2])}, {joined(parts[1::2])})"


def words(form: Packed) -> str:
    """The pointers `NAME_cell` to the words of its codes."""
    cell = f"{form.name.lower()}_cell"
    return f"{cell}.to(tl.pointer_type(tl.uint{8 * word_bytes(form)}))" if word_bytes(form) > 1 else cell


def read(target: str, at: str, *conditions: str) -> Lines:
    """`target` from the pointers `at` where all conditions hold that are not empty; 0 elsewhere."""
    mask = " & ".join(condition for condition in conditions if condition)
    return load(target, at, mask, "0") if mask else [f"{target} = tl.load({at})"]


def scale_lines(form: Packed, cell: str, index: str, *conditions: str) -> Lines:
    """`NAME_scale` and, where there are least values, `NAME_least`, float16, at `index` of the bytes at the pointers `cell`."""
    name = form.name.lower()
    lines = [f"{name}_half = ({cell} + {form.constant('BODY')}).to(tl.pointer_type(tl.float16)) + {index}"]
    parts = (("scale", ""),) if form.form.symmetric else (("scale", ""), ("least", f" + {form.constant('GROUPS')}"))
    return [*lines, *(line for part, offset in parts for line in read(f"{name}_{part}", f"{name}_half{offset}", *conditions))]


def token_lines(form: Packed, source: str, present: str) -> Lines:
    """Tokens with groups of channels: a token's groups stand side by side, each with its scale."""
    name, block = form.name.lower(), max(16, power_of_two(form.size))
    groups = 1 if form.groups == 1 else block // form.share
    there = f"{present}[:, None]" if present else ""
    few = f"({name}_word < {form.size // form.per_byte // word_bytes(form)})[None, :]" if form.size < block else ""
    some = f"({name}_group < {form.constant('GROUPS')})" if groups > form.groups else ""
    lines = [
        f"{name}_cell = {source} + first_slot * {form.constant('BYTES')} + row[:, None] * {form.constant('BYTES')}",
        f"{name}_word = tl.arange(0, {block // form.per_byte // word_bytes(form)})",
        *read(f"{name}_items", f"{words(form)} + {name}_word[None, :]", there, few),
        *number_lines(form, "BLOCK_T", "BLOCK_D"),
        f"{name}_group = tl.arange(0, {groups})[None, :]",
        *scale_lines(form, f"{name}_cell", f"{name}_group", there, some),
    ]
    if groups == 1:
        return [*lines, scaled(form, "")]
    cut = f"{name}_numbers = tl.reshape({name}_numbers, [BLOCK_T, {groups}, {form.share}])"
    return [*lines, cut, scaled(form, "[:, :, None]"), f"{name}_tile = tl.reshape({name}_tile, [BLOCK_T, BLOCK_D])"]


def channel_lines(form: Packed, source: str, step: int) -> Lines:
    """Channels with groups of tokens: the step's groups of a channel stand side by side; a longer group is read in part."""
    name, tokens, per = form.name.lower(), form.form.tokens, form.per_byte
    held = min(tokens, step)
    per *= word_bytes(form)
    before, offset = (f" - start % {tokens}", f"start % {tokens} // {per} + ") if tokens > step else ("", "")
    group = f"tl.arange(0, {step // held}) * {tokens * form.form.width(form.size)}"
    there = "(dim < D)" if form.size < max(16, power_of_two(form.size)) else ""
    lines = [
        f"{name}_cell = {source} + (first_slot{before}) * {form.constant('BYTES')} + ({group})[None, :]",
        f"{name}_word = {offset}tl.arange(0, {held // per})",
        *read(
            f"{name}_items",
            f"{words(form)}[:, :, None] + dim[:, None, None] * {tokens // per} + {name}_word[None, None, :]",
            f"{there}[:, None, None]" if there else "",
        ),
        f"{name}_items = tl.reshape({name}_items, [BLOCK_D, {step // per}])",
        *number_lines(form, "BLOCK_D", "BLOCK_T"),
        *scale_lines(form, f"{name}_cell", "dim[:, None]", f"{there}[:, None]" if there else ""),
    ]
    cut = f"{name}_numbers = tl.reshape({name}_numbers, [BLOCK_D, {step // held}, {held}])"
    return [*lines, cut, scaled(form, "[:, :, None]"), f"{name}_tile = tl.reshape({name}_tile, [BLOCK_D, BLOCK_T])"]
