"""Linear layers over weights that are numbers: tiles of 16 rows, whose results are one vector, so that no sum crosses lanes.

Weights of bf16 lie in pairs of columns, which processors that have an instruction for it multiply and add at once.
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.packed_forms import helpers
from qcompile.codegen.cpp.source import call, constants
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

LAYOUTS = {"fp32": "tiles", "fp16": "tiles", "bf16": "tiles-pairs"}
"""Storage of a weight -> how it lies."""


def emit_linear(spec: KernelSpec) -> Kernel:
    """`x Wᵀ + b`: one row by itself, or blocks of rows over chunks of tiles that stay near."""
    single = BUCKETS[spec.bucket][1] == 1
    if not single:
        spec = replace(spec, bucket="m2-63")  # one kernel for any number of rows but one
    real = type_of(spec, "x")
    bias = f"bias.at<{real}>()" if spec.format("bias") else f"static_cast<const {real}*>(nullptr)"
    weight = f"weight.at<WeightOf<{real}>::Word>()"
    given = [f"x.row<{real}>(0)", weight, bias, f"out.row<{real}>(0)"] if single else ["x", weight, bias, "out"]
    function = f"one_row<{real}, SINGLE_WIDE>" if single else f"many_rows<{real}, WIDE>"
    body = [
        *constants({"rows": (spec.size("N"), "of the weight"), "columns": (spec.size("K"), "of the weight and of x")}),
        *call(function, [*given, "team.share((rows + TILE - 1) / TILE)", "rows", "columns"]),
    ]
    return kernel(spec, LINEAR.present(spec), body, helpers("floats"), [("weight", LAYOUTS[str(spec.format("weight"))])])


LINEAR = Operator(
    emit=emit_linear,
    operands={"x": FLOATS, "weight": FLOATS, "bias": FLOATS, "out": FLOATS},
    optional=frozenset({"bias"}),
    sizes=("K", "N"),
    buckets=tuple(BUCKETS),
    refuses=lambda spec: same_storage(spec, "x", "weight", "bias", "out"),
)
