"""The application: its commands, and what an error becomes."""

from __future__ import annotations

import warnings
from typing import Any

import typer
from rich.markup import escape

import qcompile
from qcompile.cli import (
    bench,
    bisecting,
    blaming,
    building,
    compiling,
    diffing,
    evaluating,
    exporting,
    inspecting,
    listing,
    planning,
    replaying,
    running,
)  # fmt: skip
from qcompile.cli.output import stderr
from qcompile.errors import QCompileError

BAD_INPUT = 2
INTERRUPTED = 130


class _Group(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Turn bad input into one red line and a meaningful exit code; a crash keeps its traceback."""
        try:
            return super().invoke(ctx)
        except QCompileError as error:
            stderr().print(f"[bold red]error:[/] [red]{escape(str(error))}[/]", soft_wrap=True, highlight=False)
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(qcompile.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """A compiler for low-bit inference."""
    del version
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """A warning of ours is one line for the user; anybody else's keeps its place in the code."""
    del file, line
    place = "" if category is UserWarning and "qcompile" in filename else f" ({category.__name__}, {filename}:{lineno})"
    stderr().print(f"[bold yellow]warning:[/] {escape(str(message))}{escape(place)}", soft_wrap=True, highlight=False)


app.command("compile")(compiling.compile_model)
app.command("plan")(planning.plan_model)
app.command("build")(building.build)
app.command("run")(running.run)
app.command("eval")(evaluating.evaluate_artifact)
app.command("export")(exporting.export)
app.command("inspect")(inspecting.inspect)
app.command("diff")(diffing.diff)
app.command("blame")(blaming.blame)
app.command("bench")(bench.bench)
app.command("replay")(replaying.replay)
app.command("bisect")(bisecting.bisect)
app.command("passes")(listing.passes)
app.command("targets")(listing.targets)
