"""Attention over what has settled, packed in pages, and what is kept as it came: the loop of `attention.py`, walked twice.

A token that some lines of a tile see packed and others as it came is met in both loops, by each line in one of them: `border` says where
a line's settled tokens end. Among programs that share a sequence the last one takes what is kept, the others the pages.
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.codegen.triton.attention import emit_decode, emit_prefill, mix_tile, page_lines, refuses_heads
from qcompile.codegen.triton.block_vectors import BlockVectors
from qcompile.codegen.triton.cache_tiles import Tiles
from qcompile.codegen.triton.contract import FLOATS, HALVES, Operator, same_storage, stored
from qcompile.codegen.triton.packed_attention import decode_step
from qcompile.codegen.triton.packed_forms import PACKED, TABLES, refuses_tables
from qcompile.codegen.triton.retained import (
    POLICY,
    policy_constants,
    policy_of,
    refuses_policy,
    scan_constants,
    sequence_range,
    settled,
)
from qcompile.codegen.triton.settled_form import SettledForm, refuses_form, settled_form
from qcompile.codegen.triton.settled_tiles import kept_tiles, settled_tiles
from qcompile.codegen.triton.source import Lines, constants, loop
from qcompile.codegen.triton.tiles import Architecture, attention_keys
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

KEPT_STEP = 32
"""Kept tokens of a step beside blocks: they are gathered number by number, and more addresses than that do not fit into registers."""
LEAST_STEP = 16
"""Tokens that a matrix instruction adds up over."""
FORMS = (("k_form", "KEY"), ("v_form", "VALUE"))


def forms_of(spec: KernelSpec) -> tuple[SettledForm, SettledForm]:
    """How keys and how values are packed."""
    keys, values = (settled_form(spec.option(option), spec.size("D"), name) for option, name in FORMS)
    return keys, values


def settled_walk(spec: KernelSpec, tiles: Tiles, split: bool) -> tuple[Lines, Lines]:
    """The pages, then the rows and the new tokens."""
    forms = forms_of(spec)
    blocks = any(isinstance(form, BlockVectors) for form in forms)
    came = kept_tiles(*forms, stored(spec, "q"), KEPT_STEP if blocks else tiles.step)
    block = "BLOCK_R" if blocks else "BLOCK_T"
    numbers: dict[str, tuple[int | float, str]] = {**policy_constants(policy_of(spec)), **scan_constants()}
    numbers |= {"BLOCK_R": (came.step, "kept tokens of a step")} if blocks else {}
    for form in forms:
        numbers |= {} if isinstance(form, BlockVectors) else form.constants()
    prepare = [*constants(numbers), *sequence_range(early=not split), *walk_range(spec, split, block)]
    step = kept_step(spec, came, block)
    kept = (
        loop(f"for start in range(0, columns, {block})", step)
        if split
        else loop(f"for step in range(0, columns - skipped, {block})", ["start = step + tl.where(step < pause, 0, skipped)", *step])
    )
    return prepare, [*settled_loop(spec, tiles), *came.channels, *kept]


def walk_range(spec: KernelSpec, split: bool, block: str) -> Lines:
    """`border` of each line; slots `first` to `last` of the pages, and `columns` of what is kept, that this program takes.

    Where it takes all, steps of `block` columns leave out `skipped` of them from `pause` on: new tokens that every line sees packed.
    """
    window = int(spec.option("window", 0))
    earliest = "tl.min(tl.where(position >= 0, position, 2147483647), axis=0) - (WINDOW + FIRST - 1)"
    lines = [
        f"border = {settled('position + 1')}",
        "last = tl.minimum(tl.max(border, axis=0) - FIRST, pages * page_tokens)",
        # A step begins at a multiple of its length, so that no group of tokens begins inside it.
        *([f"first = tl.minimum(tl.maximum({earliest}, 0) // BLOCK_T * BLOCK_T, last)"] if window else ["first = 0"]),
    ]
    if not split:
        return [
            *lines,
            "columns = ROWS + tl.minimum(sequence, (tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // SHARED + 1)",
            f"pause = (ROWS + early + {block} - 1) // {block} * {block}",
            # A token stands as many columns behind the rows as it is new, or more where padding stands before it.
            "waiting = tl.min(tl.where(position >= 0, border, length), axis=0)",
            f"skipped = tl.maximum((ROWS + tl.maximum(waiting - held, 0)) // {block} * {block} - pause, 0)",
        ]
    return [
        *lines,
        "share = (last - first + (SPLITS - 1) * BLOCK_T - 1) // ((SPLITS - 1) * BLOCK_T) * BLOCK_T",
        "first = first + tl.program_id(0) * share",
        "last = tl.minimum(first + share, last)",
        "columns = tl.where(tl.program_id(0) == SPLITS - 1, ROWS + sequence, 0)",
    ]


def settled_loop(spec: KernelSpec, tiles: Tiles) -> Lines:
    """The loop over settled tokens; where it is not known before that no step crosses a page, one loop for either case."""
    header = "for start in range(first, last, BLOCK_T)"
    whole = loop(header, settled_step(spec, tiles, whole=True))
    if tiles.together > 1:
        return whole
    crossing = loop(header, settled_step(spec, tiles, whole=False))
    return [*loop("if (page_tokens % BLOCK_T == 0) | (pages == 1)", whole), *loop("else", crossing)]


def settled_step(spec: KernelSpec, tiles: Tiles, *, whole: bool) -> Lines:
    """One step over BLOCK_T settled tokens, which lie in one page if `whole`; slots count them from position FIRST on."""
    place = [
        "page = tl.load(page_table + batch * pages + start // page_tokens).to(tl.int64)",
        "first_slot = (page * L + head) * page_tokens + start % page_tokens",
        "row = tl.arange(0, BLOCK_T)",
    ]
    together = tiles.together > 1
    masked = not together or any(isinstance(form, BlockVectors) for form in forms_of(spec))
    return [
        *(["start = tl.multiple_of(start, BLOCK_T)"] if whole else []),
        "place = start + tl.arange(0, BLOCK_T)",
        "key = place + FIRST",
        *(["present = place < last"] if masked else []),
        *(place if whole else [*page_lines("place"), "first_slot = 0", "row = slot"]),
        *mix_tile(spec, tiles, f"{'' if together else 'present[None, :] & '}(key[None, :] < border[:, None])"),
    ]


def kept_step(spec: KernelSpec, tiles: Tiles, block: str) -> Lines:
    """One step over `block` columns of what `with_recent` gave: rows, of which each held one position before the call, then new tokens."""
    return [
        f"column = start + tl.arange(0, {block})",
        # Rows are written in turn: each holds the latest position that falls to it.
        "row_key = tl.where(column < FIRST, column, held - 1 - (held - 1 - column + TURNING) % TURNING)",
        f"waits = (row_key < held) & ((column < FIRST) | (row_key >= {settled('held')}))",
        "new = (column >= ROWS) & (column < ROWS + sequence)",
        "fresh = tl.load(positions + batch * sequence + column - ROWS, mask=new, other=-1).to(tl.int32)",
        "key = tl.where(column < ROWS, tl.where(waits, row_key, -1), fresh)",
        "present = key >= 0",
        "slot = (batch * L + head) * (ROWS + sequence) + column",
        "unsettled = (key < FIRST)[None, :] | (key[None, :] >= border[:, None])",
        *mix_tile(spec, tiles, "present[None, :] & (key[None, :] <= position[:, None]) & unsettled"),
    ]


def emit_attend_settled(spec: KernelSpec, arch: Architecture) -> Kernel:
    """The kernel of the bucket: `m1` is one token of each sequence."""
    most = attention_keys(spec.size("D"), arch)
    forms = forms_of(spec)
    together = max(form.form.tokens for form in forms)
    step = min(most, together) if together > 1 else most
    blocks = [form for form in forms if isinstance(form, BlockVectors)]
    if spec.bucket == "m1" and len(blocks) == len(forms):
        step = decode_step(spec, blocks)
    tiles = settled_tiles(*forms, stored(spec, "q"), step)
    # Where a wide head leaves registers for few keys, numbers made of codes take those of half the lines too.
    tiles = replace(tiles, lines=min(64, most))
    emit = emit_decode if spec.bucket == "m1" else emit_prefill
    return emit(spec, arch, tiles, settled_walk)


def refuses_attend_settled(spec: KernelSpec) -> str | None:
    """What attention over numbers refuses, formats that no kernel reads, and groups of tokens that do not settle together."""
    mixed = same_storage(spec, "q", "out") or same_storage(spec, "exact_keys", "exact_values")
    size = spec.size("D")
    form = next((reason for option, _ in FORMS if (reason := refuses_form(option, spec.option(option), size))), None)
    reason = refuses_heads(spec) or mixed or form or refuses_policy(spec)
    reason = reason or refuses_tables(spec, zip(TABLES, forms_of(spec), strict=True))
    if reason is None:
        torn = [packed.form.tokens for packed in forms_of(spec) if policy_of(spec).group % packed.form.tokens]
        reason = f"group={spec.option('group')}: expected a multiple of the {torn[0]} tokens that are packed together" if torn else None
    return reason or refuses_short_groups(spec)


def refuses_short_groups(spec: KernelSpec) -> str | None:
    """Groups of tokens that are shorter than the shortest step, so that a step may cross a page."""
    together = max(form.form.tokens for form in forms_of(spec))
    return f"groups of {together} tokens: expected 1, or at least {LEAST_STEP}" if 1 < together < LEAST_STEP else None


ATTEND_SETTLED = Operator(
    emit=emit_attend_settled,
    operands={
        "q": HALVES,
        "keys": PACKED,
        "values": PACKED,
        **dict.fromkeys(TABLES, PACKED),
        "exact_keys": HALVES,
        "exact_values": HALVES,
        "page_table": ("i32",),
        "positions": ("i64",),
        "sinks": FLOATS,
        "out": HALVES,
    },
    optional=frozenset({"sinks", *TABLES}),
    sizes=("D", "H", "L"),
    options=("k_form", "v_form", *POLICY, "scale", "window", "softcap"),
    required=("k_form", "v_form", *POLICY, "scale"),
    buckets=("", *BUCKETS),
    refuses=refuses_attend_settled,
)
