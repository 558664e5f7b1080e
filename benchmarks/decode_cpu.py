"""Decode speed on the CPU beside llama.cpp: the same model at 4 bits, the same thread count, one run, a ratio.

    python benchmarks/decode_cpu.py [--model FILE.gguf] [--threads 1] [--tokens 64] [--engine native]

Both decode greedily after the same prompt; each is warmed up, then timed `--repeat` times in turn, and the medians are compared.
llama.cpp reads the file's own 4-bit blocks; ours is compiled from the same file with `cpu-int4`, embedding and head in float.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import qcompile
from qcompile.frontend.pinned import smollm2_path

PROMPT = list(range(1000, 1032))
CONTEXT = 512


def main() -> None:
    """Print a short table and write `benchmarks/results/<date>-decode-cpu-<threads>t.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a .gguf file (default: the pinned SmolLM2-135M-Instruct)")
    parser.add_argument("--target", default="cpu-int4")
    parser.add_argument("--engine", default=None, help="such as native (default: the target's own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    model = options.model or smollm2_path()
    torch.set_num_threads(options.threads)
    runs = {"qcompile": _qcompile(model, options.target, options.engine), "llama.cpp": _llama_cpp(model, options.threads)}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for decode in runs.values():
        decode(8)
    for _ in range(options.repeat):
        for name, decode in runs.items():
            speeds[name].append(options.tokens / decode(options.tokens))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {
        "date": datetime.date.today().isoformat(), "processor": platform.processor() or platform.machine(), "model": model.name,
        "target": options.target, "engine": options.engine, "threads": options.threads, "tokens": options.tokens,
        "tokens_per_second": medians, "all": speeds, "ratio": medians["qcompile"] / medians["llama.cpp"],
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"{result['date']}-decode-cpu-{options.threads}t.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in medians.items():
        print(f"{name:>10}  {value:7.1f} tokens/s")
    print(f"{'ratio':>10}  {result['ratio']:7.2f}   (written to {path})")


def _qcompile(model: Path, target: str, engine_name: str | None) -> Callable[[int], float]:
    """Seconds for so many decode steps of our own."""
    engine = qcompile.compile(model, target, max_context=CONTEXT, engine=engine_name).engine

    def decode(count: int) -> float:
        token = int(engine.prefill([PROMPT])[0].argmax())
        started = time.perf_counter()
        for _ in range(count):
            token = int(engine.decode([token])[0].argmax())
        return time.perf_counter() - started

    return decode


def _llama_cpp(model: Path, threads: int) -> Callable[[int], float]:
    """Seconds for so many decode steps of llama.cpp."""
    try:
        from llama_cpp import Llama
    except ImportError:
        sys.exit("benchmarks/decode_cpu.py: expected llama-cpp-python, got none; pip install llama-cpp-python (it builds from source)")
    peer = Llama(str(model), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False)

    def decode(count: int) -> float:
        peer.reset()
        peer.eval(PROMPT)
        token = int(peer.sample(temp=0.0))
        started = time.perf_counter()
        for _ in range(count):
            peer.eval([token])
            token = int(peer.sample(temp=0.0))
        return time.perf_counter() - started

    return decode


if __name__ == "__main__":
    main()
