"""Attention over a cache packed token by token: the tiles of `packed_forms.py` in the kernels of `attention.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qcompile.codegen.triton.attention import emit_decode, emit_prefill, key_range, mix_tile, page_lines, refuses_heads
from qcompile.codegen.triton.cache_tiles import Tiles
from qcompile.codegen.triton.contract import FLOATS, HALVES, Operator, same_storage, stored
from qcompile.codegen.triton.packed_forms import (
    PACKED,
    TABLES,
    PackedForm,
    key_tile,
    packed_form,
    refuses_packed,
    refuses_tables,
    value_tile,
)
from qcompile.codegen.triton.source import Lines, loop
from qcompile.codegen.triton.tiles import Architecture, attention_keys
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

MOST_LANES = 32
"""Of a part, in a step of 128 tokens."""


def forms_of(spec: KernelSpec) -> tuple[PackedForm, PackedForm]:
    """How keys and how values are packed."""
    return packed_form(spec.option("k_form"), spec.size("D")), packed_form(spec.option("v_form"), spec.size("D"))


def refuses_forms(spec: KernelSpec) -> str | None:
    """Forms that kernels do not read, and tables that are not the form's."""
    reasons = (refuses_packed(spec.option(name), spec.size("D")) for name in ("k_form", "v_form"))
    return next(filter(None, reasons), None) or refuses_tables(spec, zip(TABLES, forms_of(spec), strict=True))


def refuses_attend_packed(spec: KernelSpec) -> str | None:
    """What attention over numbers refuses, and forms that no kernel reads."""
    return refuses_heads(spec) or same_storage(spec, "q", "out") or refuses_forms(spec)


def packed_tiles(spec: KernelSpec, step: int) -> Tiles:
    """Keys and values of a specification, `step` tokens at a time."""
    keys, values = forms_of(spec)
    kind = stored(spec, "q")
    return Tiles(key_tile(keys, kind), value_tile(values, kind), step)


def packed_walk(spec: KernelSpec, tiles: Tiles, split: bool) -> tuple[Lines, Lines]:
    """Where no step crosses a page, its page is looked up once and everything else about its addresses is known before the loop."""
    aligned = ["first = first // BLOCK_T * BLOCK_T"] if spec.option("window", 0) else []
    inner = "for start in range(first, last, BLOCK_T)"
    lines = [
        *loop("if (page_tokens % BLOCK_T == 0) | (pages == 1)", loop(inner, packed_step(spec, tiles, whole=True))),
        *loop("else", loop(inner, packed_step(spec, tiles, whole=False))),
    ]
    return key_range(spec, split, aligned), lines


def packed_step(spec: KernelSpec, tiles: Tiles, *, whole: bool) -> Lines:
    """One step over BLOCK_T keys, which lie in one page if `whole`."""
    page = [
        "page = tl.load(page_table + batch * pages + start // page_tokens).to(tl.int64)",
        "first_slot = (page * L + head) * page_tokens + start % page_tokens",
        "row = tl.arange(0, BLOCK_T)",
    ]
    return [
        "key = start + tl.arange(0, BLOCK_T)",
        "present = key < last",
        *(page if whole else [*page_lines("key"), "first_slot = 0", "row = slot"]),
        *mix_tile(spec, tiles, "present[None, :] & (key[None, :] <= position[:, None])"),
    ]


def decode_step(spec: KernelSpec, forms: Iterable[PackedForm]) -> int:
    """Tokens of a step of decoding: 128 where they fit into registers, for a third of a step of 64 is not for its tokens."""
    pairs = [form.in_pairs for form in forms]
    fits = spec.size("D") <= 128 and all(form.bits <= 4 and form.lanes <= MOST_LANES for form in pairs)
    return 128 if fits else 64


def prefill_lines(spec: KernelSpec, arch: Architecture) -> int:
    """Lines of a program of prefill: 64; what warps multiply for themselves spills over heads of more than 128, the more so in groups."""
    if spec.size("D") <= 128 or arch.matrix != "mma":
        return 64
    return 32 if all(form.groups == 1 for form in forms_of(spec)) else 16


def emit_attend_packed(spec: KernelSpec, arch: Architecture) -> Kernel:
    """The kernel of the bucket: `m1` is one token of each sequence."""
    if spec.bucket == "m1":
        return emit_decode(spec, arch, packed_tiles(spec, decode_step(spec, forms_of(spec))), packed_walk)
    tiles = packed_tiles(spec, attention_keys(spec.size("D"), arch))
    return emit_prefill(spec, arch, replace(tiles, lines=prefill_lines(spec, arch)), packed_walk)


ATTEND_PACKED = Operator(
    emit=emit_attend_packed,
    operands={
        "q": HALVES,
        "keys": PACKED,
        "values": PACKED,
        **dict.fromkeys(TABLES, PACKED),
        "page_table": ("i32",),
        "positions": ("i64",),
        "sinks": FLOATS,
        "out": HALVES,
    },
    optional=frozenset({"sinks", *TABLES}),
    sizes=("D", "H", "L"),
    options=("k_form", "v_form", "scale", "window", "softcap"),
    required=("k_form", "v_form", "scale"),
    buckets=("", *BUCKETS),
    refuses=refuses_attend_packed,
)
