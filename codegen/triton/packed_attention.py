"""Attention over a cache packed token by token: the loop of `attention.py` over the tiles of `packed_vectors.py`."""

from __future__ import annotations

from qcompile.codegen.triton.attention import emit_decode, emit_prefill, refuses_heads
from qcompile.codegen.triton.cache_tiles import Tiles
from qcompile.codegen.triton.contract import FLOATS, HALVES, Operator, same_storage, stored
from qcompile.codegen.triton.packed_vectors import PackedVectors, packed_keys, packed_values, packed_vectors, refuses_packed
from qcompile.codegen.triton.tiles import Architecture, attention_keys
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

PACKED = ("uint8",)


def forms_of(spec: KernelSpec) -> tuple[PackedVectors, PackedVectors]:
    """How keys and how values are packed."""
    return packed_vectors(spec.option("k_form"), spec.size("D")), packed_vectors(spec.option("v_form"), spec.size("D"))


def refuses_forms(spec: KernelSpec) -> str | None:
    """Forms that kernels do not read."""
    return next((reason for name in ("k_form", "v_form") if (reason := refuses_packed(spec.option(name), spec.size("D")))), None)


def refuses_attend_packed(spec: KernelSpec) -> str | None:
    """What attention over numbers refuses, and forms that no kernel reads."""
    return refuses_heads(spec) or same_storage(spec, "q", "out") or refuses_forms(spec)


def packed_tiles(spec: KernelSpec, step: int) -> Tiles:
    """Keys and values of a specification, `step` tokens at a time."""
    keys, values = forms_of(spec)
    kind = stored(spec, "q")
    return Tiles(packed_keys(keys, kind), packed_values(values, kind), step)


def emit_attend_packed(spec: KernelSpec, arch: Architecture) -> Kernel:
    """The kernel of the bucket: `m1` is one token of each sequence."""
    step = attention_keys(spec.size("D"), arch)
    if spec.bucket == "m1":
        return emit_decode(spec, arch, packed_tiles(spec, step))
    return emit_prefill(spec, arch, packed_tiles(spec, step))


ATTEND_PACKED = Operator(
    emit=emit_attend_packed,
    operands={"q": HALVES, "keys": PACKED, "values": PACKED, "page_table": ("i32",), "positions": ("i64",), "sinks": FLOATS, "out": HALVES},
    optional=frozenset({"sinks"}),
    sizes=("D", "H", "L"),
    options=("k_form", "v_form", "scale", "window", "softcap"),
    required=("k_form", "v_form", "scale"),
    buckets=("", *BUCKETS),
    refuses=refuses_attend_packed,
)
