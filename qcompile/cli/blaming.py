"""`qcompile blame`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qcompile
from qcompile.cli.output import JsonOption, emit


def blame(
    artifact: Annotated[Path, typer.Argument(help="Directory that `qcompile compile` wrote.")],
    reference: Annotated[str, typer.Option(help="The model that it was made from: a directory, hub id, .gguf or .onnx file.")],
    tokens: Annotated[str | None, typer.Option(help="Token ids (.npy), text (.txt) to measure on; default: packaged text.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs of a plain module by name (.npz); default: its examples.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of tokens that are used.")] = 1,
    budget: Annotated[int | None, typer.Option(min=1, help="Evaluations at most; default: n log2 n, and at most 256.")] = None,
    calibration: Annotated[str | None, typer.Option(help="What it was calibrated on (.npy, .txt), if not the packaged text.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Lines of the table.")] = 10,
    dump: Annotated[Path | None, typer.Option(help="Directory of a dump that takes blame.json, for its report.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Which quantizer, in which layer, put there by which pass, costs an artifact how much of its accuracy."""
    from qcompile.blaming import read_arrays
    from qcompile.dump.blame import require_dump

    if dump is not None:
        require_dump(dump)  # said before the work, not after it
    result = qcompile.blame(
        artifact, reference, tokens=None if tokens is None else Path(tokens), inputs=None if inputs is None else read_arrays(inputs),
        windows=windows, budget=budget, calibration=None if calibration is None else Path(calibration),
    )  # fmt: skip
    if dump is not None:
        result.write(dump)
    emit(result.to_dict(), result.tables(top), as_json=as_json)
