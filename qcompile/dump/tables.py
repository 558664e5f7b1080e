"""Records and coverage as rich tables and as JSON values; shared by the command line and the demo."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from qcompile.ir.records import CoverageRow, PassRecord


def pass_table(records: Sequence[PassRecord], title: str = "passes") -> Table:
    """One line per pass: changed, time, nodes after (and difference), bytes of constants, and what it cost where it was checked.

    That is the largest error, and of lossy passes the signal-to-noise ratio and the divergence per token; the last two columns are what has
    come together since the input.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("pass")
    table.add_column("changed")
    columns = [column for column in _EFFECTS if any(getattr(record, column) is not None for record in records)]
    for header in ("time", "nodes", "weights", *(_EFFECTS[column][0] for column in columns)):
        table.add_column(header, justify="right")
    for record in records:
        table.add_row(
            record.name,
            "yes" if record.changed else "no",
            f"{record.seconds:.2f} s",
            _nodes(record),
            format_bytes(record.constant_bytes),
            *(_number(getattr(record, column), _EFFECTS[column][1]) for column in columns),
            style="" if record.changed else "dim",
        )
    return table


_EFFECTS = {
    "max_error": ("max error", ".1e"), "sqnr_db": ("SQNR", ".1f"), "kl": ("KL", ".2e"),
    "total_sqnr_db": ("SQNR to input", ".1f"), "total_kl": ("KL to input", ".2e"),
}  # fmt: skip
"""Field of a record -> header and format; a column that no record fills is not shown."""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _nodes(record: PassRecord) -> str:
    difference = record.nodes_after - record.nodes_before
    return f"{record.nodes_after} ({difference:+d})" if difference else str(record.nodes_after)


def coverage_table(rows: Sequence[CoverageRow], title: str = "coverage") -> Table:
    """Operators that were treated alike on one line: how many, in which format, by which kernel, or why left alone."""
    table = Table(title=title, title_justify="left")
    for header in ("operator", "format", "kernel", "left alone because"):
        table.add_column(header, overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for (operator, form, kernel, reason), members in group_coverage(rows).items():
        table.add_row(operator, form, kernel, reason, str(len(members)), members[0].weight or members[0].node)
    return table


def group_coverage(rows: Sequence[CoverageRow]) -> dict[tuple[str, str, str, str], list[CoverageRow]]:
    """Rows by (operator, format of weight x activations, kernel, reason), in order of first appearance."""
    groups: dict[tuple[str, str, str, str], list[CoverageRow]] = {}
    for row in rows:
        form = f"{row.format} x {row.activation}" if row.activation else row.format
        groups.setdefault((row.operator, form, row.kernel, row.reason), []).append(row)
    return groups


def coverage_rows(rows: Sequence[CoverageRow]) -> list[dict[str, Any]]:
    """Coverage as JSON values, one object per operator."""
    return [dataclasses.asdict(row) for row in rows]


def left_alone(rows: Sequence[CoverageRow]) -> Counter[str]:
    """How many operators were left alone for each reason."""
    return Counter(row.reason for row in rows if row.reason)


def value_table(values: Mapping[str, object], title: str = "") -> Table:
    """Names and values, two columns; floats with four significant digits."""
    table = Table(title=title or None, title_justify="left", show_header=False)
    table.add_column("name")
    table.add_column("value", justify="right", overflow="fold")
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def readable(values: Mapping[str, Any]) -> dict[str, object]:
    """Values for a table: byte counts get a unit, nothing becomes a dash, underscores in names become spaces."""
    return {key.replace("_", " "): _readable_value(key, value) for key, value in values.items()}


def _readable_value(key: str, value: Any) -> object:
    if value is None:
        return "-"
    return format_bytes(value) if key.endswith("_bytes") else value


def format_bytes(count: int) -> str:
    """A byte count in decimal units, three significant digits: `98.3 MB`."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def written(parts: Sequence[RenderableType], width: int = 140) -> str:
    """Tables as plain text, without colours."""
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)
