"""Real models all the way: float module -> torch.onnx -> our import -> 8 bits -> our export -> onnxruntime, beside the float module.

    python -m benchmarks.onnx_models [--models minilm efficientnet silero] [--targets cpu-int8 cpu-w8a8] [--out RESULT.md]

Needs what benchmarks.real_models needs, and onnxscript. Figures: the root mean square of the error over that of the output (`rms`), the
mean cosine of output rows, how often both choose the same (the class of an image, the nearest other sentence), and bytes of the files.
silero-vad has branches and an LSTM: each of its files is run beside onnxruntime, or refused by the node.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import qcompile
from benchmarks.real_model_table import choices
from benchmarks.real_models import RealModel, efficientnet, minilm
from qcompile.errors import QCompileError
from qcompile.frontend.pinned import PinnedWheel, wheel_directory

MODELS: dict[str, Callable[[], RealModel]] = {"minilm": minilm, "efficientnet": efficientnet}
SILERO = PinnedWheel(
    "silero-vad==6.2.3",
    "silero_vad-6.2.3-py3-none-any.whl",
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
)
FRAME = 576
"""Samples of a frame at 16 kHz, 64 of them of the frame before."""
HEADER = (
    "| model | target | rms error | cosine | same choice | float file MB | our file MB | compile s |\n|---|---|--:|--:|--:|--:|--:|--:|"
)
SILERO_HEADER = "| file | what came of it |\n|---|---|"


def main() -> None:
    """A row for each model and target; tables on the screen and in the file asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "silero"], default=[*MODELS, "silero"])
    parser.add_argument("--targets", nargs="+", default=["cpu-int8", "cpu-w8a8"])
    parser.add_argument("--batches", type=int, default=3, help="of 16 inputs, to calibrate on and to judge by")
    parser.add_argument("--out", type=Path, help="write the tables to this file (.md)")
    options = parser.parse_args()
    lines = []
    for line in tables(options):
        print(line, flush=True)
        lines.append(line)
    if options.out is not None:
        command = f"python -m benchmarks.onnx_models {' '.join(sys.argv[1:])}"
        text = "\n".join(lines)
        options.out.write_text(f"# Real models through ONNX, in and out\n\n`{command}`\n\n{text}\n", encoding="utf-8")


def tables(options: argparse.Namespace) -> Iterator[str]:
    """Both tables, line by line."""
    names = [name for name in options.models if name in MODELS]
    if names:
        yield HEADER
    for name in names:
        model = MODELS[name]()
        model = RealModel(model.module, spread(model.calibration, options.batches), spread(model.evaluation, options.batches))
        with tempfile.TemporaryDirectory() as scratch:
            source = exported(model, Path(scratch) / "float.onnx")
            for target in options.targets:
                yield row(name, model, source, target)
    if "silero" in options.models:
        if names:
            yield ""
        yield SILERO_HEADER
        for path in sorted((wheel_directory(SILERO) / "silero_vad" / "data").glob("*.onnx")):
            yield f"| {path.name} | {silero(path)} |"


def spread(batches: list[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """So many of the batches, evenly chosen."""
    return batches[:: max(1, len(batches) // count)][:count]


def exported(model: RealModel, path: Path) -> Path:
    """The float module as torch.onnx writes it."""
    inputs = model.calibration[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.module, (), str(path), kwargs=inputs, dynamo=True, verbose=False, input_names=list(inputs),
            dynamic_shapes={name: {0: batch} for name in inputs}, external_data=False,
        )  # fmt: skip
    return path


def row(name: str, model: RealModel, source: Path, target: str) -> str:
    """One line of the table: what onnxruntime makes of our file, beside the float module."""
    started = time.perf_counter()
    compiled = qcompile.compile(source, target, calibration=model.calibration, engine="torch_cpu")
    seconds = time.perf_counter() - started
    written = compiled.export_onnx(source.parent / f"{target}.onnx", profile="ort", overwrite=True)
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = torch.cat([model.module(**inputs) for inputs in model.evaluation])
    found = torch.cat([run(session, inputs) for inputs in model.evaluation])
    rms = (found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    cosine = torch.cosine_similarity(found, expected, dim=-1).mean()
    same = (choices(name, found) == choices(name, expected)).float().mean()
    sizes = f"{source.stat().st_size / 1e6:.1f} | {written.bytes / 1e6:.1f}"
    return f"| {name} | {target} | {rms:.4f} | {cosine:.5f} | {same:.3f} | {sizes} | {seconds:.0f} |"


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    """The first result."""
    return torch.from_numpy(np.array(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]))


def silero(path: Path) -> str:
    """The largest difference from onnxruntime, or why the model is refused."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    for item in session.get_inputs():
        sizes = [size if isinstance(size, int) else 1 for size in item.shape]
        sizes = [1, FRAME] if item.name == "input" else sizes
        whole = item.type == "tensor(int64)"
        inputs[item.name] = torch.full(sizes, 16_000) if whole else torch.randn(sizes, generator=generator) / 10
    try:
        compiled = qcompile.compile(path, "cpu-fp32", example_inputs=inputs, dynamic_shapes={}, engine="torch_cpu")
    except QCompileError as error:
        return f"refused: {str(error).partition(f'{path}: ')[2]}"
    result = compiled(**inputs)
    expected = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    found = list(result.values()) if isinstance(result, dict) else [result]
    errors = [(a - torch.from_numpy(b)).abs().max() / max(1e-9, np.abs(b).max()) for a, b in zip(found, expected, strict=True)]
    return f"runs; largest relative difference from onnxruntime {float(max(errors)):.1e}"


if __name__ == "__main__":
    main()
