"""Rows of a table, and the row of each sequence's last token."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.float_linear import LAYOUTS
from qcompile.codegen.cpp.loops import every_row
from qcompile.codegen.cpp.packed_forms import helpers
from qcompile.codegen.cpp.source import block, constants
from qcompile.codegen.cpp.tiles import FIXED, TABLES, looked_up, refuses_tiles, tile_layouts, tile_weight
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


def emit_quantized_embedding(spec: KernelSpec) -> Kernel:
    """Rows of a packed table, from the same tiles as a head that shares it."""
    real = type_of(spec, "out")
    body = [
        *constants({"rows": (spec.size("N"), "of the table"), "columns": (spec.size("K"), "of the table")}),
        *tile_weight(spec),
        *every_row(
            [
                "const int64_t token = std::clamp<int64_t>(indices.element<int64_t>(row), 0, rows - 1);",
                f"row_of_tiles(weight, token, out.row<{real}>(row));",
            ],
            "indices.count()",
        ),
    ]
    headers = TABLES if looked_up(spec) else FIXED
    return kernel(spec, QUANTIZED_EMBEDDING.present(spec), body, helpers(*headers), tile_layouts(spec))


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
QUANTIZED_EMBEDDING = Operator(
    emit=emit_quantized_embedding,
    operands={"indices": ("i64",), "codes": (), "scale": (), "zero": (), "scale2": (), "out": FLOATS},
    optional=frozenset({"zero", "scale2"}),
    sizes=("N", "K"),
    refuses=refuses_tiles,
)
_MOVED = (*FLOATS, "i8", "i32")
"""Rows, and what quantized rows are: codes, scales, zero points."""
GATHER_LAST = Operator(
    emit=emit_gather_last, operands={"x": _MOVED, "positions": ("i64",), "out": _MOVED}, sizes=("K",),
    refuses=lambda spec: same_storage(spec, "x", "out"),
)  # fmt: skip
