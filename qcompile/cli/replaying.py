"""`qcompile replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from qcompile.cli.importing import ImportOption, known_passes
from qcompile.cli.output import JsonOption, emit
from qcompile.dump.place_table import place_tables
from qcompile.dump.rows import record_row
from qcompile.dump.tables import pass_table, value_table

if TYPE_CHECKING:
    from qcompile.passes.replay import Replay

STILL_THERE = 1


def replay(
    file: Annotated[Path, typer.Argument(help="A file that a failed check or a crash left.")],
    step: Annotated[str | None, typer.Option("--pass", help="Passes to run in place of the recorded one, with their options.")] = None,
    modules: ImportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the pass of a reproducer again, checked; exits with 1 while it is still wrong, 0 once it is not."""
    from qcompile.codegen.select import backend_for
    from qcompile.passes.base import parse_pipeline
    from qcompile.passes.replay import replay as run_again
    from qcompile.passes.reproducer import load_reproducer

    reproducer = load_reproducer(file)
    passes = parse_pipeline(step or reproducer.spec, known_passes(modules))
    result = run_again(reproducer, passes, backend_for(reproducer.target))
    recorded: dict[str, Any] = {"file": str(file), "pass": step or reproducer.spec, "target": str(reproducer.target)}
    values = {**recorded, "recorded_error": reproducer.error, **result.to_dict(), "passes": [record_row(row) for row in result.records]}
    emit(values, [value_table(recorded), *_tables(result)], as_json=as_json)
    if result.fails:
        raise typer.Exit(STILL_THERE)


def _tables(result: Replay) -> list[RenderableType]:
    if not result.fails:
        return [pass_table(result.records), "Nothing is wrong any more."]
    return [*place_tables(result.place), f"Still wrong: {result.error}"]
