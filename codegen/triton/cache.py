"""Writing keys and values into the paged cache."""

from __future__ import annotations

from collections.abc import Iterable

from qcompile.codegen.triton.contract import HALVES, TRITON_TYPES, Operator, integer, kernel, pointer, stored, strides
from qcompile.codegen.triton.source import constants, function
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter


def emit_append(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Store k, v [B, L, S, D] at `positions` [B, S] of keys, values [P, L, R, D]."""
    heads, size = spec.size("L"), spec.size("D")
    body = [
        *constants(
            {
                "L": (heads, "key/value heads"),
                "D": (size, "numbers of a head"),
                "BLOCK_L": (power_of_two(heads), "heads, padded"),
                "BLOCK_D": (power_of_two(size), "numbers, padded"),
            }
        ),
        "token = tl.program_id(0).to(tl.int64)",
        "batch = tl.program_id(1).to(tl.int64)",
        "head = tl.arange(0, BLOCK_L)[:, None]",
        "dim = tl.arange(0, BLOCK_D)[None, :]",
        "position = tl.load(positions + batch * sequence + token).to(tl.int32)",
        "slot = position // page_tokens",
        # -1 is padding; a slot beyond the table would be another sequence's page.
        "real = (position >= 0) & (slot < pages)",
        "page = tl.load(page_table + batch * pages + slot, mask=real, other=0).to(tl.int64)",
        "present = (head < L) & (dim < D) & real",
        "cell = ((page * L + head) * page_tokens + position % page_tokens) * D + dim",
        "key = tl.load(k + batch * k_stride_0 + head * k_stride_1 + token * k_stride_2 + dim, mask=present, other=0.0)",
        f"tl.store(keys + cell, key.to({TRITON_TYPES[stored(spec, 'keys')]}), mask=present)",
        "value = tl.load(v + batch * v_stride_0 + head * v_stride_1 + token * v_stride_2 + dim, mask=present, other=0.0)",
        f"tl.store(values + cell, value.to({TRITON_TYPES[stored(spec, 'values')]}), mask=present)",
    ]
    parameters = append_parameters(spec)
    launch = Launch(spec.operator, ("sequence", "batch", 1), parameters)
    doc = "One program stores the keys and values of one token; a token at position -1 is padding and is not stored."
    return kernel(spec, arch, [function(spec.operator, [p.name for p in parameters], doc, body)], [launch])


def append_parameters(spec: KernelSpec, tables: Iterable[str] = ()) -> tuple[Parameter, ...]:
    """Of a kernel that stores k and v in pages, with `tables` of how vectors lie."""
    aligned = 16 if spec.size("D") % 16 == 0 else 1
    return (
        pointer("keys", stored(spec, "keys")),
        pointer("values", stored(spec, "values")),
        pointer("k", stored(spec, "k"), aligned),
        pointer("v", stored(spec, "v"), aligned),
        *(pointer(name, stored(spec, name)) for name in tables),
        pointer("page_table", "i32"),
        pointer("positions", "i64"),
        integer("sequence"),
        integer("pages"),
        integer("page_tokens"),
        *strides("k", (0, 1, 2), "k", aligned),
        *strides("v", (0, 1, 2), "v", aligned),
    )


def refuses_append(spec: KernelSpec) -> str | None:
    """Tokens too wide for one program."""
    width = power_of_two(spec.size("L")) * power_of_two(spec.size("D"))
    return f"L·D = {width}: expected at most 16384 numbers in a token's keys" if width > 1 << 14 else None


APPEND = Operator(
    emit=emit_append,
    operands={"keys": HALVES, "values": HALVES, "k": HALVES, "v": HALVES, "page_table": ("i32",), "positions": ("i64",)},
    sizes=("D", "L"),
    refuses=refuses_append,
)
