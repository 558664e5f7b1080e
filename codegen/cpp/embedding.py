"""Rows of a table, and the row of each sequence's last token."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.float_linear import LAYOUTS
from qcompile.codegen.cpp.loops import every_row
from qcompile.codegen.cpp.source import block, constants
from qcompile.ir.lowered import Kernel, KernelSpec


def emit_embedding(spec: KernelSpec) -> Kernel:
    """Rows of a table in tiles, as a head that shares it wants it: one copy of the table serves both."""
    kind, layout = type_of(spec, "weight"), LAYOUTS[str(spec.format("weight"))]
    step = 2 if layout == "tiles-pairs" else 1
    body = [
        *constants({"entries": (spec.size("N"), "of the table"), "columns": (spec.size("K"), "of the table")}),
        *constants({"step": (step, "columns side by side"), "words": (-(-spec.size("K") // step), "of a row")}),
        *every_row(
            [
                "const int64_t token = std::clamp<int64_t>(indices.element<int64_t>(row), 0, entries - 1);",
                f"const {kind}* from = weight.at<{kind}>() + (token / TILE * words * TILE + token % TILE) * step;",
                f"{kind}* to = out.row<{kind}>(row);",
                "for (int64_t column = 0; column < columns; column++) to[column] = from[column / step * step * TILE + column % step];",
            ],
            "indices.count()",
        ),
    ]
    return kernel(spec, EMBEDDING.present(spec), body, layouts=[("weight", layout)])


def emit_gather_last(spec: KernelSpec) -> Kernel:
    """The row of x at each sequence's greatest position, the first of several."""
    kind = type_of(spec, "x")
    move = f"std::memcpy(out.row<{kind}>(row), x.at<{kind}>(row, last), columns * sizeof({kind}));"
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        *every_row(
            [
                "const int64_t* places = positions.row<int64_t>(row);",
                "const int64_t last = std::max_element(places, places + positions.size[1]) - places;",
                *block("if (columns > 0)", [move]),
            ],
            "x.size[0]",
        ),
    ]
    return kernel(spec, GATHER_LAST.present(spec), body)


EMBEDDING = Operator(
    emit=emit_embedding, operands={"weight": FLOATS, "indices": ("i64",), "out": FLOATS}, sizes=("N", "K"),
    refuses=lambda spec: same_storage(spec, "weight", "out"),
)  # fmt: skip
_MOVED = (*FLOATS, "i8", "i32")
"""Rows, and what quantized rows are: codes, scales, zero points."""
GATHER_LAST = Operator(
    emit=emit_gather_last, operands={"x": _MOVED, "positions": ("i64",), "out": _MOVED}, sizes=("K",),
    refuses=lambda spec: same_storage(spec, "x", "out"),
)  # fmt: skip
