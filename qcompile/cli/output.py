"""Where output goes: tables or JSON to stdout, progress and errors to stderr, progress on a terminal only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_PIPE_WIDTH = 160
"""Columns of a table that is read from a file: rich's default of 80 would fold most cells."""

_ENGINES = "Engine in place of the target's own: reference, torch_cpu, native, cuda or onnxruntime."
EngineOption = Annotated[str | None, typer.Option("--engine", help=_ENGINES)]
SetsOption = Annotated[
    str | None, typer.Option("--instruction-sets", help="Of C++ libraries: avx512,avx2,portable, or here; default: all that can be built.")
]
ContextOption = Annotated[int | None, typer.Option("--max-context", min=1, help="Tokens that the cache holds; default: at most 2048.")]
BytesOption = Annotated[int | None, typer.Option("--kv-bytes", min=1, help="Bytes of the cache; default: room for --max-context tokens.")]
PageOption = Annotated[int | None, typer.Option("--page-tokens", min=1, help="Tokens of a page of the cache.")]
NativeOption = Annotated[bool, typer.Option("--allow-native", help="Run native code that was not built on this machine.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]


def stdout() -> Console:
    """A console for results."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def stderr() -> Console:
    """A console for everything that is not a result."""
    return Console(stderr=True)


def emit(values: Mapping[str, Any] | Sequence[Any], tables: Sequence[RenderableType], *, as_json: bool) -> None:
    """Print `values` as JSON, or `tables` for people."""
    if as_json:
        typer.echo(json.dumps(values, indent=2, allow_nan=False))
        return
    console = stdout()
    for table in tables:
        console.print(table)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar; the bar is gone at the end and never shown in a pipe."""
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
