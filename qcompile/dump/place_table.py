"""Where a pass went wrong, as rich tables."""

from __future__ import annotations

from rich.table import Table

from qcompile.dump.tables import value_table
from qcompile.passes.bisect import Culprit
from qcompile.passes.locate import Place


def place_tables(place: Place | None) -> list[Table]:
    """The first wrong value, and what its node reads; nothing where that is not known."""
    if place is None:
        return []
    values = {
        "node": place.node, "operator": place.operator, "source": place.source or "-", "element": list(place.index),
        "expected": place.expected, "got": place.got, "relative error": place.error,
    }  # fmt: skip
    operands = Table(title=f"what {place.node} reads", title_justify="left")
    for header in ("operand", "state", "constant", "what was done to it"):
        operands.add_column(header, overflow="fold")
    for operand in place.operands:
        operands.add_row(operand.name, operand.state, operand.constant or "-", operand.log)
    return [value_table(values, "the first value that is wrong"), operands]


def culprit_tables(culprit: Culprit) -> list[Table]:
    """The pass, the rewrite, and what that did to the graph."""
    rewrite = culprit.rewrite
    values = {
        "pass": culprit.spec,
        "place in the pipeline": culprit.index + 1,
        "rewrite": f"{rewrite.number} of {rewrite.of}" if rewrite is not None else "the pass as a whole",
        **({"node": rewrite.node} if rewrite is not None else {}),
        **({"error": culprit.error} if culprit.error else {}),
    }
    tables = [value_table(values, "the first pass after which the predicate fails")]
    if rewrite is not None:
        table = Table(title=f"what rewrite {rewrite.number} did", title_justify="left", show_lines=True)
        table.add_column("before", overflow="fold")
        table.add_column("after", overflow="fold")
        for change in rewrite.changes:
            table.add_row(change.before, change.after)
        tables.append(table)
    return tables
