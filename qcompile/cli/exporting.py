"""`qcompile export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qcompile
from qcompile.cli.output import JsonOption, emit
from qcompile.dump.tables import readable, value_table
from qcompile.errors import ExportError

FORMATS = ("onnx",)


def export(
    artifact: Annotated[Path, typer.Argument(help="Directory that `qcompile compile` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for model.onnx, or a file that ends in .onnx.")],
    form: Annotated[str, typer.Option("--format", help="What to write: onnx.")] = "onnx",
    profile: Annotated[str, typer.Option(help="portable: standard operators; ort: those of onnxruntime too.")] = "portable",
    opset: Annotated[int | None, typer.Option(help="Of the standard operators; default: the newest that onnxruntime serves.")] = None,
    external_data: Annotated[
        bool | None, typer.Option("--external-data/--single-file", help="Constants in a file of their own; default: above 1 GiB.")
    ] = None,
    accuracy_level: Annotated[int, typer.Option(help="Profile ort: 0 multiplies floats, 4 rounds activations to 8 bits.")] = 0,
    genai: Annotated[bool, typer.Option("--genai", help="Also write what onnxruntime-genai needs.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run the file in onnxruntime beside the graph; needs memory for all weights.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an artifact in another system's format, checked against the graph."""
    if form not in FORMATS:
        raise ExportError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    model = qcompile.load(artifact, engine="reference")  # its graph is exported: nothing native is run or built
    written = model.export_onnx(
        out, profile=profile, opset=opset, external_data=external_data, accuracy_level=accuracy_level, genai=genai, overwrite=overwrite,
        compare=compare,
    )  # fmt: skip
    values = {
        "path": str(written.path), "bytes": written.bytes, "weight_bytes": model.weight_bytes, "profile": written.profile,
        "opset": written.opset, "error": written.error, "not_run": written.not_run, "files": [str(file) for file in written.files],
    }  # fmt: skip
    shown = {key: value for key, value in values.items() if key != "files" and value not in (None, "")}
    emit(values, [value_table(readable(shown))], as_json=as_json)
