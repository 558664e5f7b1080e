"""A comparison of two compilations as rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.syntax import Syntax
from rich.table import Table

from qcompile.dump.compare import Change, Comparison
from qcompile.dump.tables import format_bytes

_DIFF_LINES = 20
"""Of a kernel's source that the terminal shows."""


def comparison_tables(found: Comparison) -> list[RenderableType]:
    """What differs, a table for each kind of thing, and the regressions at the end."""
    tables: list[RenderableType] = []
    for title, changes in (("compilation", found.heading), ("sizes", found.sizes), ("measured", found.figures)):
        if changes:
            tables.append(_change_table(title, changes))
    if found.passes:
        tables.append(_pass_table(found.passes))
    if found.formats:
        tables.append(_format_table(found.formats))
    if found.cache:
        tables.append(_cache_table(found.cache))
    for kernel in found.kernels:
        tables += _kernel_parts(kernel)
    if found.is_empty:
        tables.append("no difference")
    tables += [f"[bold red]regression:[/] {line}" for line in found.regressions]
    return tables


def _change_table(title: str, changes: Mapping[str, Change]) -> Table:
    table = _table(title, "what", "before", "after")
    table.add_column("change", justify="right")
    for key, (old, new) in changes.items():
        table.add_row(key.replace("_", " "), shown(key, old), shown(key, new), _growth(old, new))
    return table


def _growth(old: Any, new: Any) -> str:
    numbers = isinstance(old, int | float) and isinstance(new, int | float) and old
    return f"{100 * (new / old - 1):+.1f} %" if numbers else ""


def shown(key: str, value: Any) -> str:
    """A value as a cell: bytes with a unit, floats short, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in key:
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pass_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("passes", "pass", "only", "what", "before", "after")
    for row in rows:
        if row["only"]:
            table.add_row(row["name"], row["only"])
            continue
        for place, (key, (old, new)) in enumerate(row["changes"].items()):
            table.add_row("" if place else row["name"], "", key.replace("_", " "), shown(key, old), shown(key, new))
    return table


def _format_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("formats", "operator", "before", "after")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for row in rows:
        table.add_row(row["operator"], row["before"], row["after"], str(row["count"]), row["names"][0])
    return table


def _cache_table(layers: Mapping[str, Mapping[str, Change]]) -> Table:
    """Layers whose caches changed alike are one line each."""
    table = _table("cache", "layers", "what", "before", "after")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for layer, changes in layers.items():
        for key, (old, new) in changes.items():
            groups.setdefault((key, shown(key, old), shown(key, new)), []).append(layer)
    for (key, old, new), names in groups.items():
        table.add_row(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", key.replace("_", " "), old, new)
    return table


def _kernel_parts(kernel: Mapping[str, Any]) -> list[RenderableType]:
    table = _table(f"kernel {kernel['spec']}", "launch", "only", "what", "before", "after")
    if kernel["only"]:
        for launch in kernel[kernel["only"]]:
            table.add_row(launch["function"], kernel["only"])
    for old, new in zip(kernel["before"], kernel["after"], strict=False):
        for key in ("registers", "shared_bytes", "num_warps", "num_stages"):
            if old[key] != new[key]:
                table.add_row(new["function"], "", key.replace("_", " "), shown(key, old[key]), shown(key, new[key]))
    parts: list[RenderableType] = [table]
    lines = kernel["diff"].splitlines()
    if lines:
        more = [f"… {len(lines) - _DIFF_LINES} more lines"] if len(lines) > _DIFF_LINES else []
        parts.append(Syntax("\n".join([*lines[:_DIFF_LINES], *more]), "diff", background_color="default"))
    return parts


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
