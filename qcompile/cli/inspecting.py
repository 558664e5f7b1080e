"""`qcompile inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qcompile
from qcompile.cli.compiling import details, sizes
from qcompile.cli.output import JsonOption, emit
from qcompile.dump.cache_table import cache_tables
from qcompile.dump.html.page import write_report
from qcompile.dump.reader import Dump, is_dump
from qcompile.dump.tables import coverage_table, pass_table, readable, value_table


def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact, or a directory written by --dump.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a report to this file: a page of its own, to open in a browser.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What was done to a model: passes, sizes, the format and kernel of every operator, or why it was left alone, and its cache."""
    if html is not None:
        _write_html(path, html, as_json=as_json)
    elif is_dump(path):
        _inspect_dump(path, as_json=as_json)
    else:
        _inspect_artifact(path, as_json=as_json)


def _write_html(path: Path, html: Path, *, as_json: bool) -> None:
    values = {"report": str(html), "report_bytes": write_report(path, html)}
    emit(values, [value_table(readable(values))], as_json=as_json)


def _inspect_dump(path: Path, *, as_json: bool) -> None:
    dump = Dump.open(path)
    pipeline = dump.heading.pipeline
    emit(
        {"pipeline": pipeline, "passes": dump.passes},
        [pass_table(dump.records, title=str(path)), value_table({"pipeline": pipeline})],
        as_json=as_json,
    )


def _inspect_artifact(path: Path, *, as_json: bool) -> None:
    model = qcompile.load(path)
    summary = sizes(model)
    name = model.assets.name or model.assets.model_type
    layers = model.cache_layers
    values = value_table(readable({"model": name, **summary}))
    tables = [pass_table(model.records), coverage_table(model.coverage), *cache_tables(layers), values]
    emit({**summary, **details(model), "cache": [layer.to_dict() for layer in layers]}, tables, as_json=as_json)
