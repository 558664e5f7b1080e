"""Records and coverage as rich tables and as JSON values; shared by the command line and the demo."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from qcompile.dump.rows import record_row
from qcompile.ir.records import CoverageRow, PassRecord


def pass_table(records: Sequence[PassRecord], title: str = "passes") -> Table:
    """One line per pass: changed, time, nodes after (and difference), bytes of constants, and what it cost where it was checked.

    That is the largest error, and of lossy passes the signal-to-noise ratio and the divergence per token; the last two columns are what has
    come together since the input.
    """
    return pass_rows_table([record_row(record) for record in records], title)


def pass_rows_table(rows: Sequence[Mapping[str, Any]], title: str = "passes") -> Table:
    """The same of rows that were written."""
    table = Table(title=title, title_justify="left")
    table.add_column("pass")
    table.add_column("changed")
    columns = [column for column in _EFFECTS if any(row.get(column) is not None for row in rows)]
    for header in ("time", "nodes", "weights", *(_EFFECTS[column][0] for column in columns)):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            str(row["name"]),
            "yes" if row["changed"] else "no",
            f"{row['seconds']:.2f} s",
            _nodes(row["nodes_before"], row["nodes_after"]),
            format_bytes(row["bytes"]),
            *(_number(row.get(column), _EFFECTS[column][1]) for column in columns),
            style="" if row["changed"] else "dim",
        )
    return table


_EFFECTS = {
    "max_error": ("max error", ".1e"), "sqnr_db": ("SQNR", ".1f"), "kl": ("KL", ".2e"),
    "total_sqnr_db": ("SQNR to input", ".1f"), "total_kl": ("KL to input", ".2e"),
}  # fmt: skip
"""Field of a record -> header and format; a column that no record fills is not shown."""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _nodes(before: int, after: int) -> str:
    return f"{after} ({after - before:+d})" if after != before else str(after)


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


def note_table(notes: Sequence[Mapping[str, Any]], title: str = "left alone") -> Table:
    """Notes that say the same on one line: by which pass, why, whether that was chosen, how many nodes."""
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for note in notes:
        # A note may name its own node in the reason: what is said of many is one reason.
        reason = re.sub(rf"\b{re.escape(note['node'])}\b", "it", note["reason"])
        groups.setdefault((note["pass"], reason, note["chosen"]), []).append(note["node"])
    table = Table(title=title, title_justify="left")
    for header in ("pass", "reason"):
        table.add_column(header, overflow="fold")
    table.add_column("chosen")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for (where, reason, chosen), nodes in groups.items():
        table.add_row(where, reason, "yes" if chosen else "no", str(len(nodes)), nodes[0])
    return table


def kernel_table(kernels: Sequence[Mapping[str, Any]], title: str = "kernels") -> Table:
    """One line per launch of each kernel with a source: what it implements, how many nodes it serves, and what a launch takes."""
    table = Table(title=title, title_justify="left")
    for header in ("kernel", "implements", "launch"):
        table.add_column(header, overflow="fold")
    for header in ("nodes", "registers", "shared", "warps", "stages"):
        table.add_column(header, justify="right")
    for kernel in kernels:
        head = (str(kernel["name"]), str(kernel["spec"]))
        for place, launch in enumerate(kernel["launches"]):
            numbers = (launch["registers"], format_bytes(launch["shared_bytes"]), launch["num_warps"], launch["num_stages"])
            if str(kernel["file"]).endswith(".cpp"):  # a function of a library, which has none of these
                numbers = ("-",) * 4
            name, spec, nodes = ("", "", "") if place else (*head, str(len(kernel["nodes"])))
            table.add_row(name, spec, launch["function"], nodes, *map(str, numbers))
    return table


def library_table(libraries: Sequence[Mapping[str, Any]], title: str = "libraries") -> Table:
    """One line per library of an artifact: its file, what it is for, its size, and whether this machine runs it and built it."""
    table = Table(title=title, title_justify="left")
    for header in ("file", "machine", "instruction set"):
        table.add_column(header, overflow="fold")
    table.add_column("size", justify="right")
    for header in ("runs here", "built here"):
        table.add_column(header)
    for row in libraries:
        marks = ("yes" if row[key] else "no" for key in ("runs_here", "built_here"))
        table.add_row(row["file"], row["machine"], row["instruction_set"], format_bytes(row["bytes"]), *marks)
    return table


def distribution_table(rows: Sequence[Mapping[str, Any]], title: str = "distributions (first, middle and last layer)") -> Table:
    """One line per value: max/rms and kurtosis before the first pass that changed it and after the last, and which passes did."""
    table = Table(title=title, title_justify="left")
    table.add_column("value", overflow="fold")
    table.add_column("of", overflow="fold")
    for header in ("max/rms before", "after", "kurtosis before", "after"):
        table.add_column(header, justify="right")
    table.add_column("changed by", overflow="fold")
    stages: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault((row["kind"], row["name"]), []).append(row)
    for (kind, name), (first, *others) in stages.items():
        last = others[-1] if others else first
        numbers = (first["max_over_rms"], last["max_over_rms"], first["kurtosis"], last["kurtosis"])
        passes = ", ".join(str(row["listing"]).partition("_")[2] for row in others)
        table.add_row(kind, name, *("-" if number is None else f"{number:.3g}" for number in numbers), passes)
    return table


def readable(values: Mapping[str, Any]) -> dict[str, object]:
    """Values for a table: byte counts get a unit, nothing becomes a dash, underscores in names become spaces."""
    return {key.replace("_", " "): _readable_value(key, value) for key, value in values.items()}


def _readable_value(key: str, value: Any) -> object:
    if value is None:
        return "-"
    return format_bytes(value) if "_bytes" in key or key.startswith("bytes") else value


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
