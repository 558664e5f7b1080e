"""`qcompile passes` and `qcompile targets`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qcompile.cli.output import JsonOption, emit

if TYPE_CHECKING:
    from qcompile.target import Target


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
    """List the targets: what they compute in, how they store weights, and what runs them here."""
    from qcompile.codegen.cpp.build import find_compiler, no_compiler
    from qcompile.quant.scheme import dtype_name
    from qcompile.target import known_targets, parse_target

    rows: list[dict[str, Any]] = []
    for name in known_targets():
        target = parse_target(name)
        compute = dtype_name(target.compute)
        engine, sets = _served_by(target)
        rows.append(
            {
                "target": name, "compute": compute, "weights": str(target.scheme.weight or compute), "engine": engine,
                "instruction_sets": list(sets),
            }
        )  # fmt: skip
    missing = "" if find_compiler() else f"cpu-* is served by torch_cpu: {no_compiler()}"
    table = Table(caption=missing or None, caption_justify="left")
    for header in rows[0]:
        table.add_column(header.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(", ".join(cell) if isinstance(cell, list) else cell for cell in row.values()))
    emit(rows, [table], as_json=as_json)


def _served_by(target: Target) -> tuple[str, tuple[str, ...]]:
    """The engine of a target, and the instruction sets that libraries are built for here."""
    from qcompile.codegen.cpp.build import find_compiler, instruction_sets

    if target.arch == "cpu":
        return ("native", instruction_sets()) if find_compiler() else ("torch_cpu", ())
    return ("cuda" if target.is_cuda else "onnxruntime" if target.is_onnx else "reference"), ()
