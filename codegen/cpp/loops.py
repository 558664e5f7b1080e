"""Loops that kernels over rows are made of, and the pointers that they begin with."""

from __future__ import annotations

from qcompile.codegen.cpp.contract import type_of
from qcompile.codegen.cpp.source import Lines, block, function
from qcompile.ir.lowered import KernelSpec

EVERY_VECTOR = function(
    "template <class Step>\nstatic inline void every_vector", ["int64_t first", "int64_t last", "Step step"],
    "Columns by vectors: `step` is told where one begins and how many columns it has, LANES in all but the last.",
    [
        "int64_t column = first;",
        "for (; column + LANES <= last; column += LANES) step(column, std::integral_constant<int64_t, LANES>());",
        "if (column < last) step(column, last - column);",
    ],
)  # fmt: skip


def every_row(lines: Lines, rows: str = "out.rows()") -> Lines:
    """The lines for each row of this thread's share; `row` is its number."""
    return [
        f"const Range mine = team.share({rows});",
        *block("for (int64_t row = mine.first; row < mine.last; row++)", lines),
    ]


def vectors(lines: Lines, first: str = "0", last: str = "columns") -> Lines:
    """The lines for every vector of columns: `column` is where it begins, `count` how many there are."""
    return [f"every_vector({first}, {last}, [&](int64_t column, auto count) {{", *(f"    {line}" for line in lines), "});"]


def row_pointer(spec: KernelSpec, operand: str, name: str) -> str:
    """The declaration of `name`, where row `row` of an operand begins."""
    kept = "" if operand.startswith("out") else "const "
    return f"{kept}{type_of(spec, operand)}* {name} = {operand}.row<{type_of(spec, operand)}>(row);"


def pointer(spec: KernelSpec, operand: str, name: str) -> Lines:
    """The declaration of `name`, where an operand begins; nothing if the specification has none."""
    if not spec.format(operand):
        return []
    return [f"const {type_of(spec, operand)}* {name} = {operand}.at<{type_of(spec, operand)}>();"]
