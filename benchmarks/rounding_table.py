"""Bits, KL and seconds of weight formats and roundings on one model; nothing else is quantized.

    python -m benchmarks.rounding_table --calib TOKENS.npy --eval TOKENS.npy [--model PATH] [--rotated] [--windows N]
        [--formats "int4 g64 sym fp16;nf4 g36 sym int8"] [--roundings nearest,mse-clip,gptq] [--before "split-outliers{columns=4}"]

The model is SmolLM2 unless another is given; token files are integer arrays [windows, length]. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.evaluation import evaluate, logits_of
from qcompile.frontend.pinned import smollm2_path
from qcompile.passes.base import Pass, parse_pipeline
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.pipelines import default_pipeline, insert, registry
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.quant.format import parse_format
from qcompile.quant.scheme import QuantScheme
from qcompile.target import parse_target

FORMATS = (
    "int4 g64 sym fp16", "int4 g36 sym int8", "nf4 g64 sym fp16", "nf4 g36 sym int8", "fp4 g16 sym e4m3", "fp4 g32 sym e8m0",
    "int3 g64 sym fp16", "int2 g64 asym fp16",
)  # fmt: skip


def pipeline(rounding: str, *, rotated: bool, before: str) -> list[Pass]:
    """The default pipeline with this rounding, perhaps in a rotated basis, and with further passes right before the rounding."""
    steps = [
        QuantizeWeights(rounding=rounding) if step.name == QuantizeWeights.name else step
        for step in default_pipeline(parse_target("cpu-int4"), "nearest")
    ]
    for step in parse_pipeline(before, registry()):
        steps = insert(steps, step, before=QuantizeWeights.name)
    for step in [FoldNorms(), RotateHadamard()] if rotated else []:
        steps = insert(steps, step, before="rewrite-kv-cache")
    return steps


def row(model: Path, text: str, steps: list[Pass], calibration: Tensor, tokens: Tensor, reference: CompiledModel) -> str:
    """One line of the table."""
    scheme = QuantScheme("int4", weight=parse_format(text))
    started = time.perf_counter()
    compiled = qcompile.compile(
        model, "cpu-int4", scheme=scheme, passes=steps, calibration=calibration, max_context=tokens.shape[1], engine="torch_cpu"
    )
    seconds = time.perf_counter() - started
    rounding = sum(record.seconds for record in compiled.records if record.name == QuantizeWeights.name)
    result = evaluate(logits_of(compiled), tokens, logits_of(reference))
    return f"| {compiled.bits_per_weight:.3f} | {result.kl:.4f} | {result.perplexity:.2f} | {rounding:.0f} | {seconds:.0f} |"


def main() -> None:
    """Parse the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--windows", type=int, default=None, help="evaluate on this many windows only")
    parser.add_argument("--formats", default=";".join(FORMATS))
    parser.add_argument("--roundings", default="nearest,mse-clip,gptq")
    parser.add_argument("--before", default="", help="passes right before the rounding")
    parser.add_argument("--rotated", action="store_true", help="rotate the residual stream and the values first")
    options = parser.parse_args()
    model = options.model or smollm2_path()
    calibration, tokens = (torch.from_numpy(np.load(path).astype(np.int64)) for path in (options.calib, options.eval))
    tokens = tokens[: options.windows]
    reference = qcompile.compile(model, "cpu-fp32", recipe="nearest", max_context=tokens.shape[1], engine="torch_cpu")
    print("| format | rounding | bits | KL | perplexity | rounding, s | compile, s |\n|---|---|---|---|---|---|---|")
    for text in options.formats.split(";"):
        for rounding in options.roundings.split(","):
            steps = pipeline(rounding, rotated=options.rotated, before=options.before)
            print(f"| {text} | {rounding} {row(model, text, steps, calibration, tokens, reference)}", flush=True)


if __name__ == "__main__":
    main()
