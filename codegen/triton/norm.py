"""Normalizations over the last axis: one program holds one row in registers."""

from __future__ import annotations

from qcompile.codegen.triton.contract import FLOATS, HALVES, TRITON_TYPES, Operator, kernel, pointer, same_storage, stored
from qcompile.codegen.triton.source import Lines, constants, function
from qcompile.codegen.triton.tiles import Architecture, power_of_two, row_warps
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

LONGEST_ROW = 1 << 15


def refuses_norm(spec: KernelSpec) -> str | None:
    """Rows that do not fit into the registers of one program, and mixed activation types."""
    if spec.size("K") > LONGEST_ROW:
        return f"K={spec.size('K')}: expected at most {LONGEST_ROW} columns, a program holds the whole row"
    return same_storage(spec, "x", "residual", "out", "out1")


def row_lines(spec: KernelSpec) -> Lines:
    """Where a program stands: `row`, `column` and the place `at` in a contiguous matrix."""
    size = spec.size("K")
    return [
        *constants({"K": (size, "columns"), "BLOCK": (power_of_two(size), "columns of a program")}),
        "row = tl.program_id(0).to(tl.int64)",
        "column = tl.arange(0, BLOCK)",
        "inside = column < K",
        "at = row * K + column",
    ]


def affine(spec: KernelSpec, offset: float) -> Lines:
    """Gain and bias, where they are there."""
    lines = []
    if spec.format("weight"):
        gain = "tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)"
        lines.append(f"normed *= {gain} + {offset}" if offset else f"normed *= {gain}")
    if spec.format("bias"):
        lines.append("normed += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)")
    return lines


def load_row(spec: KernelSpec) -> Lines:
    """`wide`: the row in float32; with a residual the sum rounded to its type and stored, as the definition has it."""
    if spec.format("residual") is None:
        return ["wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)"]
    return [
        "wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)",
        f"summed = wide.to({TRITON_TYPES[stored(spec, 'out')]})",
        "tl.store(out + at, summed, mask=inside)",
        "wide = summed.to(tl.float32)",
    ]


def emit_norm(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Root-mean-square normalization with or without a residual sum, or layer normalization."""
    result = "out1" if spec.format("out1") else "out"
    eps = float(spec.option("eps"))
    centre = ["wide = tl.where(inside, wide - tl.sum(wide, axis=0) / K, 0.0)"]
    body = [
        *row_lines(spec),
        *load_row(spec),
        *(centre if spec.operator == "layer_norm" else []),
        f"normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / K + {eps})",
        *affine(spec, float(spec.option("offset", 0.0))),
        f"tl.store({result} + at, normed.to({TRITON_TYPES[stored(spec, result)]}), mask=inside)",
    ]
    names = [name for name in ("x", "residual", "weight", "bias", "out", "out1") if spec.format(name)]
    parameters = tuple(pointer(name, stored(spec, name)) for name in names)
    doc = "One program normalizes one row; sums are in float32."
    launch = Launch(spec.operator, ("rows", 1, 1), parameters, (), row_warps(spec.size("K")))
    return kernel(spec, arch, [function(spec.operator, names, doc, body)], [launch])


_ROW = {"x": HALVES, "weight": FLOATS}

RMS_NORM = Operator(
    emit=emit_norm,
    operands={**_ROW, "out": HALVES},
    optional=frozenset({"weight"}),
    sizes=("K",),
    options=("eps", "offset"),
    required=("eps",),
    refuses=refuses_norm,
)
ADD_RMS_NORM = Operator(
    emit=emit_norm,
    operands={**_ROW, "residual": HALVES, "out": HALVES, "out1": HALVES},
    optional=frozenset({"weight"}),
    sizes=("K",),
    options=("eps", "offset"),
    required=("eps",),
    refuses=refuses_norm,
)
LAYER_NORM = Operator(
    emit=emit_norm,
    operands={**_ROW, "bias": FLOATS, "out": HALVES},
    optional=frozenset({"weight", "bias"}),
    sizes=("K",),
    options=("eps",),
    required=("eps",),
    refuses=refuses_norm,
)
