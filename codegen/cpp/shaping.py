"""Tensors put together and taken apart along an axis, and what is made of the numbers of a row: softmax, sums, the greatest."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import EVERY_VECTOR, every_row, row_pointer, vectors
from qcompile.codegen.cpp.packed_forms import helpers
from qcompile.codegen.cpp.source import block, constants
from qcompile.ir.lowered import Kernel, KernelSpec, item_operand

MOST_PARTS = 8
"""Tensors that are put together at most."""
_KINDS = (*FLOATS, "i64", "i32", "i8", "bool")
_PARTS = tuple(item_operand("tensors", place) for place in range(MOST_PARTS))
_INDICES = ("index", *(item_operand("indices", place) for place in range(4)))
_COLUMNS = "const int64_t columns = x.size[x.rank - 1];"


def emit_cat(spec: KernelSpec) -> Kernel:
    """Parts beside each other along an axis."""
    kind, names, dim = type_of(spec, "out"), [name for name in _PARTS if spec.format(name)], int(spec.option("dim"))
    if dim == -1:
        copies = [f"to = std::copy_n({name}.row<{kind}>(row), {name}.size[{name}.rank - 1], to);" for name in names]
        return kernel(spec, CAT.present(spec), every_row([f"{kind}* to = out.row<{kind}>(row);", *copies]))
    lines = [
        f"const int64_t axis = out.rank - {-dim};",
        "int64_t place = place_along(out, row, axis), part = 0;",
        "while (place >= parts[part]->size[axis]) place -= parts[part++]->size[axis];",
        "const int64_t source = row_along(out, row, axis, parts[part]->size[axis], place);",
        f"std::copy_n(parts[part]->row<{kind}>(source), out.size[out.rank - 1], out.row<{kind}>(row));",
    ]
    parts = f"const Tensor* const parts[] = {{{', '.join(f'&{name}' for name in names)}}};"
    return kernel(spec, CAT.present(spec), [parts, *every_row(lines)], helpers("shaping"))


def emit_select(spec: KernelSpec) -> Kernel:
    """The places along an axis that a list of numbers names; negative ones count from the end."""
    kind, index, dim = type_of(spec, "out"), next(name for name in _INDICES if spec.format(name)), int(spec.option("dim"))
    taken = f"int64_t place = *{index}.at<int64_t>({{}});"
    if dim == -1:
        number = [taken.format("column"), "to[column] = from[place < 0 ? place + columns : place];"]
        lines = [
            f"const {kind}* from = x.row<{kind}>(row);",
            f"{kind}* to = out.row<{kind}>(row);",
            *block("for (int64_t column = 0; column < out.size[out.rank - 1]; column++)", number),
        ]
        return kernel(spec, SELECT.present(spec), [_COLUMNS, *every_row(lines)])
    lines = [
        f"const int64_t axis = out.rank - {-dim}, length = x.size[axis];",
        taken.format("place_along(out, row, axis)"),
        "const int64_t source = row_along(out, row, axis, length, place < 0 ? place + length : place);",
        f"std::copy_n(x.row<{kind}>(source), out.size[out.rank - 1], out.row<{kind}>(row));",
    ]
    return kernel(spec, SELECT.present(spec), every_row(lines), helpers("shaping"))


def emit_gather(spec: KernelSpec) -> Kernel:
    """Of each row of x the numbers at the places that the same row of `index` names."""
    kind = type_of(spec, "x")
    lines = [
        f"const {kind}* from = x.row<{kind}>(row);",
        "const int64_t* places = index.row<int64_t>(row);",
        f"{kind}* to = out.row<{kind}>(row);",
        "for (int64_t column = 0; column < out.size[out.rank - 1]; column++) to[column] = from[places[column]];",
    ]
    return kernel(spec, GATHER.present(spec), every_row(lines))


def emit_softmax(spec: KernelSpec) -> Kernel:
    """`e^(x - greatest) / sum` of each row; the numerators are made twice, so that nothing of a row is kept."""
    lines = [
        row_pointer(spec, "x", "from"),
        row_pointer(spec, "out", "to"),
        "float peak = -INFINITY;",
        "for (int64_t column = 0; column < columns; column++) peak = std::max(peak, get(from + column));",
        "Floats parts{};",
        *vectors(
            [
                "float numbers[LANES];",
                "store(numbers, exp(load(from + column, count) - splat(peak)));",
                "parts += load(numbers, count);",
            ]
        ),
        "const Floats total = splat(sum(parts));",
        *vectors(["store(to + column, exp(load(from + column, count) - splat(peak)) / total, count);"]),
    ]
    return kernel(spec, SOFTMAX.present(spec), [_COLUMNS, *every_row(lines)], [EVERY_VECTOR])


def emit_sum(spec: KernelSpec) -> Kernel:
    """The sum, or the mean, of each row."""
    value = "sum(from, columns)" + (" / columns" if spec.option("mean") else "")
    lines = [row_pointer(spec, "x", "from"), f"put(&out.element<{type_of(spec, 'out')}>(row), {value});"]
    return kernel(spec, SUM.present(spec), [_COLUMNS, *every_row(lines, "x.rows()")])


def emit_greatest(spec: KernelSpec) -> Kernel:
    """The greatest of each row in falling order and where they stand, the first of equal ones before the others."""
    best = [
        "int64_t best = -1;",
        *block(
            "for (int64_t column = 0; column < columns; column++)",
            [
                "const float value = get(from + column);",
                "// What is no number counts as the greatest; what is taken already comes no more.",
                "const auto above = [](float a, float b) { return a > b || (a != a && b == b); };",
                "if (std::find(places, places + rank, column) != places + rank) continue;",
                "if (best < 0 || above(value, get(from + best))) best = column;",
            ],
        ),
        "places[rank] = best;",
        "to[rank] = from[best];",
    ]
    lines = [
        row_pointer(spec, "logits", "from"),
        row_pointer(spec, "out", "to"),
        "int64_t* places = out1.row<int64_t>(row);",
        *block("for (int64_t rank = 0; rank < taken; rank++)", best),
    ]
    sizes = constants({"taken": (spec.option("k"), "of a row")})
    return kernel(spec, GREATEST.present(spec), [*sizes, "const int64_t columns = logits.size[logits.rank - 1];", *every_row(lines)])


CAT = Operator(
    emit=emit_cat, operands={**dict.fromkeys(_PARTS, _KINDS), "out": _KINDS}, optional=frozenset(_PARTS[1:]), sizes=(), options=("dim",),
    required=("dim",), refuses=lambda spec: same_storage(spec, *_PARTS, "out"),
)  # fmt: skip
SELECT = Operator(
    emit=emit_select, operands={"x": _KINDS, **dict.fromkeys(_INDICES, ("i64",)), "out": _KINDS}, optional=frozenset(_INDICES), sizes=(),
    options=("dim",), required=("dim",), refuses=lambda spec: same_storage(spec, "x", "out"),
)  # fmt: skip
GATHER = Operator(
    emit=emit_gather,
    operands={"x": _KINDS, "index": ("i64",), "out": _KINDS},
    sizes=(),
    refuses=lambda spec: same_storage(spec, "x", "out"),
)
SOFTMAX = Operator(emit=emit_softmax, operands={"x": FLOATS, "out": FLOATS}, sizes=())
SUM = Operator(emit=emit_sum, operands={"x": FLOATS, "out": FLOATS}, sizes=(), options=("mean",))
GREATEST = Operator(
    emit=emit_greatest, operands={"logits": FLOATS, "out": FLOATS, "out1": ("i64",)}, sizes=(), options=("k",), required=("k",),
    refuses=lambda spec: same_storage(spec, "logits", "out"),
)  # fmt: skip
