"""From a compiled graph to ONNX files that were checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompile.errors import ExportError
from qcompile.exporters.onnx import check
from qcompile.exporters.onnx.emitter import PROFILES
from qcompile.exporters.onnx.genai import genai_files
from qcompile.exporters.onnx.model import LARGEST_OPSET, LEAST_OPSET, make_model
from qcompile.exporters.onnx.writer import write
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets

_ROUNDS = ("quantize_activation", "quantize_static", "_quantize", "pack_vectors", "integer_", "float8_linear")
"""What the names of operators hold that round while running."""
_LEVELS = (0, 4)


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: of the model.
        files: all of them.
        bytes: in all.
        opset: of the standard operators.
        profile: `portable` or `ort`.
        error: the greatest difference of onnxruntime's results from the graph's, relative to the largest; None where it was not run.
        not_run: why it was not run.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    opset: int
    profile: str
    error: float | None
    not_run: str = ""


def export(
    graph: Graph, path: str | os.PathLike[str], assets: Assets, *, profile: str = "portable", opset: int | None = None,
    external_data: bool | None = None, accuracy_level: int = 0, genai: bool = False, max_context: int = 2048, overwrite: bool = False,
    compare: bool = True, logits_to_keep: bool = False,
) -> OnnxFile:  # fmt: skip
    """Write a graph, check the file and compare it with the graph; nothing is left where that fails.

    Args:
        graph: a final graph.
        path: a file that ends in `.onnx`, or a directory for `model.onnx`.
        assets: of the model; `genai` writes the tokenizer.
        profile: `portable` is standard operators only; `ort` takes those of onnxruntime (MatMulNBits, GroupQueryAttention).
        opset: of the standard operators, 21 to 25; by default the newest that the installed onnxruntime serves.
        external_data: put constants into a file of their own; by default where they take more than 1 GiB.
        accuracy_level: of MatMulNBits, in profile `ort`: 0 multiplies floats, 4 rounds activations to 8 bits, faster.
        genai: also write what onnxruntime-genai needs to load the directory.
        max_context: tokens that a sequence may have, for `genai`.
        overwrite: replace files that are there.
        compare: run the file in onnxruntime beside the graph; without, no more than a constant stands in memory.
        logits_to_keep: give the file of a language model an input of that name, int64 [1], which 0 stands for if it is left out: how many
            last tokens of each row get logits, 0 for all.

    Raises:
        ExportError: for a node that ONNX does not express, a result that differs, a path that is taken, or an option that does not exist.
    """
    _require(profile, opset, accuracy_level)
    target = Path(path)
    directory, name = (target.parent, target.name) if target.suffix == ".onnx" else (target, "model.onnx")
    if genai and target.suffix == ".onnx":
        raise ExportError(f"export_onnx: {target}: expected a directory for genai=True, got a file; leave the suffix out")
    number = check.newest_opset() if opset is None else opset
    model = make_model(graph, number, profile, accuracy_level, logits_to_keep=logits_to_keep)
    extra = genai_files(graph, assets, name, max_context) if genai else {}
    _require_free(directory, [name, f"{name}.data", *extra], overwrite)
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=directory))
    try:
        written = write(model, scratch / name, external_data=external_data)
        check.check_file(written[0])
        error, reason = check.compare(written[0], graph) if compare else (None, "not asked for")
        _require_close(error, graph, accuracy_level, target)
        moved = _moved([*written, *_written(extra, scratch)], directory)
    except BaseException:
        if not existed:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return OnnxFile(directory / name, moved, sum(file.stat().st_size for file in moved), number, profile, error, reason)


def _require(profile: str, opset: int | None, accuracy_level: int) -> None:
    if profile not in PROFILES:
        raise ExportError(f"export_onnx: profile {profile!r}: expected one of {', '.join(PROFILES)}")
    if opset is not None and not LEAST_OPSET <= opset <= LARGEST_OPSET:
        raise ExportError(
            f"export_onnx: opset {opset}: expected {LEAST_OPSET} to {LARGEST_OPSET}; leave it out for the newest that is served"
        )
    if accuracy_level not in _LEVELS:
        raise ExportError(f"export_onnx: accuracy_level {accuracy_level}: expected 0 (floats) or 4 (activations in 8 bits)")


def _require_free(directory: Path, names: list[str], overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise ExportError(f"export_onnx: {directory}: expected a directory or a path that does not exist, got a file; choose another")
    taken = [directory / name for name in names if (directory / name).exists()]
    if taken and not overwrite:
        raise ExportError(
            f"export_onnx: {taken[0]}: expected a path that does not exist; choose another, or overwrite it (overwrite=True, --overwrite)"
        )


def _require_close(error: float | None, graph: Graph, accuracy_level: int, target: Path) -> None:
    if error is None:
        return
    values = [node.meta.get("val") for node in graph.fx.nodes if node.op != "get_attr"]
    half = any(isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) for value in values)
    rounds = half or accuracy_level == 4 or any(part in str(node.target) for node in graph.fx.nodes for part in _ROUNDS)
    bound = check.ROUNDED if rounds else check.EXACT
    if error > bound:
        raise ExportError(
            f"export_onnx: {target}: expected results within {bound:g} of the graph's, relative to the largest, got {error:.3g} from "
            "onnxruntime; nothing was written; try another profile or opset, and report this"
        )


def _written(extra: Mapping[str, bytes], directory: Path) -> list[Path]:
    for name, content in extra.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in extra]


def _moved(files: list[Path], directory: Path) -> tuple[Path, ...]:
    """Each file renamed to its place, the model last: a constant's file is there before what names it."""
    for file in reversed(files):
        file.replace(directory / file.name)
    return tuple(directory / file.name for file in files)
