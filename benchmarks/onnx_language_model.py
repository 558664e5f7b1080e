"""A language model through ONNX, out and in: greedy tokens and logits beside our own engine, or beside the Hugging Face model.

    python -m benchmarks.onnx_language_model out ARTIFACT [--profiles portable ort]
    python -m benchmarks.onnx_language_model in MODEL.onnx --model DIR [--passes PIPELINE] [--calibration CALIB.npy]

`out` exports an artifact and decodes 30 tokens after five prompts in onnxruntime and by `generate`. `in` compiles a file, as
`float_model` of `benchmarks/onnx_peers.py` makes it from DIR, for `cpu-fp32` and compares with DIR's own model, whose tokenizer it takes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcompile
from qcompile.exporters.onnx.check import empty_past, session, step
from qcompile.runtime.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is", "Once upon a time, in a small village,", "def fibonacci(n):", "Water boils at a temperature of",
    "The three primary colors are",
)  # fmt: skip
TOKENS = 30


def main() -> None:
    """Print a line for each file or prompt, then a sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("out")
    out.add_argument("artifact", type=Path)
    out.add_argument("--profiles", nargs="+", default=["portable", "ort"])
    read = commands.add_parser("in")
    read.add_argument("file", type=Path)
    read.add_argument("--model", type=Path, required=True, help="the Hugging Face directory that the file was made from")
    read.add_argument("--passes", help="a pipeline in place of the default one")
    read.add_argument("--calibration", type=Path)
    options = parser.parse_args()
    go_out(options) if options.command == "out" else come_in(options)


def go_out(options: argparse.Namespace) -> None:
    """Each profile's file beside the artifact's own engine."""
    model = qcompile.load(options.artifact, max_context=512)
    tokenizer = Tokenizer(model.assets)
    with tempfile.TemporaryDirectory() as scratch:
        for profile in options.profiles:
            written = model.export_onnx(Path(scratch) / profile, profile=profile)
            run, same, worst = session(str(written.path), threads=torch.get_num_threads()), 0, 0.0
            for prompt in PROMPTS:
                ids = tokenizer.encode(prompt)
                ours = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, ignore_eos=True)[0]
                expected = model(torch.tensor([ids + ours]))["logits"][0].double()
                found = forced(run, ids, ours)
                same += int((found[:-1].argmax(-1) == torch.tensor(ours)).sum())
                worst = max(worst, float((found - expected[len(ids) - 1 :]).abs().max()))
            share = written.bytes / model.weight_bytes
            print(f"{profile}: {same} of {TOKENS * len(PROMPTS)} tokens, logits within {worst:.2g}, {share:.4f} of the weights' bytes")


def forced(run: Any, ids: list[int], tokens: list[int]) -> Tensor:
    """Logits [T + 1, V] after a prompt and after each of T tokens behind it, decoded one by one."""
    logits, past = step(run, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), empty_past(run, 1))
    rows = [logits[0, -1]]
    for count, token in enumerate(tokens, len(ids) + 1):
        logits, past = step(run, torch.tensor([[token]]), torch.ones(1, count, dtype=torch.long), past)
        rows.append(logits[0, -1])
    return torch.stack(rows)


def come_in(options: argparse.Namespace) -> None:
    """The file, compiled, beside the model that it was made from."""
    compiled = qcompile.compile(
        options.file, "cpu-fp32", max_context=128, passes=options.passes, calibration=options.calibration, engine="torch_cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    same = 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
            expected = model(ids).logits
        theirs, ours = whole[0, ids.shape[1] :].tolist(), compiled.generate(ids, max_new_tokens=TOKENS, ignore_eos=True)[0]
        same += sum(left == right for left, right in zip(theirs, ours, strict=True))
        error = float((compiled(ids)["logits"] - expected).abs().max() / expected.abs().max())
        print(f"{prompt!r}: logits within {error:.2g} of the largest")
    print(f"{same} of {TOKENS * len(PROMPTS)} tokens")


if __name__ == "__main__":
    main()
