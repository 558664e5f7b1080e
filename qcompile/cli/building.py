"""`qcompile build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompile.cli.output import JsonOption, SetsOption, emit, stderr
from qcompile.dump.facts import library_rows
from qcompile.dump.tables import library_table


def build(
    artifact: Annotated[Path, typer.Argument(help="Directory that `qcompile compile` wrote, here or elsewhere.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the result; default: in place.")] = None,
    instruction_sets: SetsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build an artifact's libraries on this machine from its checked graph: what a host does once with what came from elsewhere."""
    from qcompile.rebuild import build_artifact

    console = stderr()
    console.quiet = not console.is_terminal
    with console.status(f"building {artifact}"):
        contents = build_artifact(artifact, out, instruction_sets=instruction_sets, overwrite=overwrite)
    rows = library_rows(contents)
    emit({"artifact": str(out or artifact), "libraries": rows}, [library_table(rows)], as_json=as_json)
