"""`qcompile inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

import qcompile
from qcompile.cli.output import JsonOption, emit
from qcompile.dump.cache_table import cache_tables
from qcompile.dump.facts import Facts, distribution_rows, facts_of_dump, facts_of_model
from qcompile.dump.html.page import write_report
from qcompile.dump.provenance import provenance, provenance_tables
from qcompile.dump.reader import is_dump
from qcompile.dump.tables import (
    coverage_table,
    distribution_table,
    kernel_table,
    library_table,
    note_table,
    pass_rows_table,
    readable,
    value_table,
)


def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact, or a directory written by --dump.")],
    node: Annotated[str | None, typer.Option(help="A node or constant as the listing names it: where it comes from.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report to this file, to open in a browser.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What was done to a model: passes, sizes, the format and kernel of every operator, or why it was left alone, and its cache."""
    facts = read_facts(path)
    if html is not None:
        written = {"report": str(html), "report_bytes": write_report(facts, html)}
        emit(written, [value_table(readable(written))], as_json=as_json)
    elif node is not None:
        found = provenance(facts, node)
        emit(found, provenance_tables(found), as_json=as_json)
    else:
        emit(facts.to_dict(), _tables(facts), as_json=as_json)


def read_facts(path: Path) -> Facts:
    """What a dump or an artifact tells.

    Raises:
        SourceError: for a dump that cannot be read.
        ArtifactError: for a directory that is neither, or an artifact that cannot be read.
    """
    # Nothing is run: any engine will do, and the one that is always there warns of nothing.
    return facts_of_dump(path) if is_dump(path) else facts_of_model(qcompile.load(path, engine="reference"), path)


def _tables(facts: Facts) -> list[RenderableType]:
    """The facts in the order of the work: passes, what they did to values, what came out."""
    tables: list[RenderableType] = [pass_rows_table(facts.passes, title=f"passes of {facts.path}")]
    distributions = distribution_rows(facts.distributions or {"weights": (), "activations": ()})
    if distributions:
        tables.append(distribution_table(distributions))
    if facts.coverage:
        tables.append(coverage_table(facts.coverage))
    if facts.notes:
        tables.append(note_table(facts.notes))
    tables += cache_tables(facts.cache)
    if any(row["launches"] for row in facts.kernels):
        tables.append(kernel_table(facts.kernels))
    if facts.libraries:
        tables.append(library_table(facts.libraries))
    values = {
        "model": facts.model,
        "target": facts.target,
        **({"engine": facts.engine} if facts.engine else {}),
        "matmul": facts.matmul,
        **facts.sizes,
        **facts.figures,
        "pipeline": facts.pipeline,
    }
    tables.append(value_table(readable(values)))
    if facts.interruption:
        tables.append(f"[bold red]interrupted[/] {facts.interruption}")
    return tables
