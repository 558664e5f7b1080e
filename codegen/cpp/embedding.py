"""Rows of a table, and the row of each sequence's last token."""

from __future__ import annotations

from qcompile.codegen.cpp.contract import Operator, kernel
from qcompile.codegen.cpp.norm import every_row
from qcompile.codegen.cpp.source import block, constants
from qcompile.ir.lowered import Kernel, KernelSpec


def emit_embedding(spec: KernelSpec) -> Kernel:
    """Rows of a table in tiles, as a head that shares it wants it: one copy of the table serves both."""
    body = [
        *constants({"entries": (spec.size("N"), "of the table"), "columns": (spec.size("K"), "of the table")}),
        *every_row(
            [
                "const int64_t token = std::clamp<int64_t>(indices.element<int64_t>(row), 0, entries - 1);",
                "const float* from = weight.at<float>() + token / TILE * columns * TILE + token % TILE;",
                "float* to = out.row<float>(row);",
                "for (int64_t column = 0; column < columns; column++) to[column] = from[column * TILE];",
            ],
            "indices.count()",
        ),
    ]
    return kernel(spec, EMBEDDING.present(spec), body, layouts=[("weight", "tiles")])


def emit_gather_last(spec: KernelSpec) -> Kernel:
    """The row of x at each sequence's greatest position, the first of several."""
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        *every_row(
            [
                "const int64_t* places = positions.row<int64_t>(row);",
                "const int64_t last = std::max_element(places, places + positions.size[1]) - places;",
                *block("if (columns > 0)", ["std::memcpy(out.row<float>(row), x.at<float>(row, last), columns * sizeof(float));"]),
            ],
            "x.size[0]",
        ),
    ]
    return kernel(spec, GATHER_LAST.present(spec), body)


_FLOAT = ("fp32",)
EMBEDDING = Operator(emit=emit_embedding, operands={"weight": _FLOAT, "indices": ("i64",), "out": _FLOAT}, sizes=("N", "K"))
GATHER_LAST = Operator(emit=emit_gather_last, operands={"x": _FLOAT, "positions": ("i64",), "out": _FLOAT}, sizes=("K",))
