"""Decode speed in onnxruntime: our files beside `torch.onnx` in float and what onnxruntime's quantizer makes of that, in one run.

    python -m benchmarks.onnx_decode --model DIR --tokens EVAL.npy --calibration CALIB.npy [--windows 10] [--threads 1] [--out RESULT.json]

The model (a Hugging Face directory) is compiled as `cpu-int4`, blocks of 64, head and embedding in float, and exported in both profiles,
with float products (accuracy level 0) and with activations in 8 bits (4); the quantizer gets the same blocks and levels. Each file decodes
greedily after the same prompt, in turn, several times; medians are compared. KL is that of the next token against the float file,
over windows of text, in nats.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import qcompile
from benchmarks.onnx_peers import BLOCK, float_model, quantized_model
from qcompile.compiled import CompiledModel
from qcompile.exporters.onnx.check import empty_past

PROMPT = list(range(1000, 1032))
HEADER = "| file | bytes | tokens/s | against the quantizer's | KL |\n|---|--:|--:|--:|--:|"


def main() -> None:
    """Make the files, time them in turn, measure KL, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--float-file", type=Path, help="what torch.onnx made of it, in place of exporting (minutes)")
    parser.add_argument("--artifact", type=Path, help="a cpu-int4 artifact of it, in place of compiling")
    parser.add_argument("--tokens", type=Path, required=True, help="token ids [windows, length] to measure on (.npy)")
    parser.add_argument("--calibration", type=Path, help="token ids to calibrate on (.npy)")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file (.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = make_files(options, Path(scratch))
        runs = {name: session(path, options.threads, level) for name, (path, level) in files.items()}
        seconds = timed({name: decoder(run, options.new_tokens) for name, run in runs.items()}, options.repeat)
        speeds = {name: options.new_tokens / statistics.median(values) for name, values in seconds.items()}
        windows = np.load(options.tokens)[: options.windows].astype(np.int64)
        losses = divergences(runs, windows)
        sizes = {name: size_of(path) for name, (path, _) in files.items()}
    rows = [{"file": name, "bytes": sizes[name], "tokens_per_second": speeds[name], "kl": losses[name]} for name in sizes]
    print(HEADER)
    for row in rows:
        print(line(row, speeds))
    if options.out is not None:
        about = {"date": datetime.date.today().isoformat(), "threads": options.threads, "windows": options.windows, "prompt": len(PROMPT)}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def line(row: dict[str, Any], speeds: dict[str, float]) -> str:
    """A row of the table; the ratio is to the quantizer's file of the same level."""
    peer = f"quantizer, level {row['file'][-1]}"
    ratio = f"{speeds[row['file']] / speeds[peer]:.2f}" if peer in speeds else ""
    return f"| {row['file']} | {row['bytes'] / 1e6:.0f} MB | {row['tokens_per_second']:.1f} | {ratio} | {row['kl']:.4f} |"


def make_files(options: argparse.Namespace, scratch: Path) -> dict[str, tuple[Path, int]]:
    """Name -> file, and the level that onnxruntime's fusion of standard operators is given."""
    source = options.float_file or float_model(options.model, scratch / "float.onnx")
    made: dict[str, tuple[Path, int]] = {"torch.onnx, float": (source, 0)}
    for level in (0, 4):
        made[f"quantizer, level {level}"] = (quantized_model(source, scratch / f"quantizer-{level}.onnx", level), level)
    compiled = artifact(options)
    for level in (0, 4):
        for profile in ("portable", "ort"):
            path = scratch / f"{profile}-{level}.onnx"
            written = compiled.export_onnx(path, profile=profile, accuracy_level=level if profile == "ort" else 0)
            made[f"qcompile {profile}, level {level}"] = (written.path, level)
    return made


def artifact(options: argparse.Namespace) -> CompiledModel:
    """Ours."""
    if options.artifact is not None:
        return qcompile.load(options.artifact)
    return qcompile.compile(
        options.model, "cpu-int4", calibration=options.calibration, max_context=512, group_size=BLOCK, engine="torch_cpu"
    )


def size_of(path: Path) -> int:
    """Bytes of a file and of its constants beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def session(path: Path, threads: int, level: int) -> onnxruntime.InferenceSession:
    """A session; `level` is what a product that is fused from standard operators gets."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def decoder(run: onnxruntime.InferenceSession, count: int) -> Callable[[], None]:
    """Decode `count` tokens greedily behind the prompt; the past stays where onnxruntime put it."""
    names = [output.name for output in run.get_outputs()]

    def decode() -> None:
        past, ids, total = empty_past(run, 1), PROMPT, len(PROMPT)
        for _ in range(count):
            arrays = {"input_ids": np.array([ids], dtype=np.int64), "attention_mask": np.ones((1, total), dtype=np.int64)}
            given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
            logits, *present = run.run_with_ort_values(names, {**given, **past})
            past = {name.replace("present.", "past_key_values.", 1): value for name, value in zip(names[1:], present, strict=True)}
            ids, total = [int(logits.numpy()[0, -1].argmax())], total + 1

    return decode


def timed(runs: dict[str, Callable[[], None]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each run, all in turn, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for decode in runs.values():
        decode()
    for _ in range(repeat):
        for name, decode in runs.items():
            started = time.perf_counter()
            decode()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def divergences(runs: dict[str, onnxruntime.InferenceSession], windows: np.ndarray[Any, Any]) -> dict[str, float]:
    """KL of the next token against the first run, over windows [W, S]; the mean over all positions."""
    totals = dict.fromkeys(runs, 0.0)
    for window in windows:
        expected = None
        for name, run in runs.items():
            logits = forward(run, window)
            expected = logits if expected is None else expected
            totals[name] += float((expected.exp() * (expected - logits)).sum(-1).mean())
    return {name: total / len(windows) for name, total in totals.items()}


def forward(run: onnxruntime.InferenceSession, window: np.ndarray[Any, Any]) -> torch.Tensor:
    """Logarithms of probabilities [S, V] after each token of a window."""
    arrays = {"input_ids": window[None], "attention_mask": np.ones((1, len(window)), dtype=np.int64)}
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    (logits,) = run.run_with_ort_values(["logits"], {**given, **empty_past(run, 1)})
    return torch.from_numpy(logits.numpy()[0]).double().log_softmax(-1)


if __name__ == "__main__":
    main()
