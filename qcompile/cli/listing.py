"""`qcompile passes` and `qcompile targets`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich.table import Table

from qcompile.cli.output import JsonOption, emit


def passes(as_json: JsonOption = False) -> None:
    """List the passes with their options and a line each."""
    from qcompile.passes.pipelines import registry

    rows: list[dict[str, Any]] = [
        {"name": name, "exact": item.exact, "options": _options(item), "description": _first_line(item)}
        for name, item in registry().items()
    ]
    table = Table()
    for header in ("pass", "exact", "options", "what it does"):
        table.add_column(header, overflow="fold")
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(row["name"], "yes" if row["exact"] else "no", options, row["description"])
    emit(rows, [table], as_json=as_json)


def _options(item: type[Any]) -> dict[str, str]:
    return {field.name: str(field.default) for field in dataclasses.fields(item)}


def _first_line(item: type[Any]) -> str:
    return (inspect.getdoc(item) or "").splitlines()[0]


def targets(as_json: JsonOption = False) -> None:
    """List the targets: what they compute in and how they store weights."""
    from qcompile.quant.scheme import dtype_name
    from qcompile.target import known_targets, parse_target

    rows = []
    for name in known_targets():
        target = parse_target(name)
        compute = dtype_name(target.compute)
        rows.append({"target": name, "compute": compute, "weights": str(target.scheme.weight or compute)})
    table = Table()
    for header in rows[0]:
        table.add_column(header)
    for row in rows:
        table.add_row(*row.values())
    emit(rows, [table], as_json=as_json)
