"""How long GPTQ of SmolLM2 takes here and in llm-compressor, one after the other in one run: same model, same tokens, same format.

    python -m benchmarks.gptq_time --calib CALIB.npy --peers PYTHON [--repeat 1]

`--peers` is the interpreter of an environment with llmcompressor. Ours is timed twice: the whole of `qcompile.compile` (with reading,
tracing and kernels) and the pass alone, which is what `oneshot` on a loaded model does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy import ROOT, run_entry
from benchmarks.accuracy_model import write_directory

RESULT = ROOT / "benchmarks" / "results" / "gptq_time.md"


def main() -> None:
    """Alternate both, print and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    options.eval = None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.model or write_directory(folder / "model")
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for _ in range(options.repeat):
            runs["ours"].append(_measured(run_entry(sys.executable, "ours", "w4-gptq", options, model, folder)))
            runs["theirs"].append(_measured(run_entry(str(options.peers), "peers", "llm-compressor-gptq-w4", options, model, folder)))
    text = _text(runs, options.calib.name)
    print(text)
    if options.windows is None:
        RESULT.write_text(text + "\n", encoding="utf-8")


def _measured(result: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(result, str):
        sys.exit(result)
    return result


def _text(runs: dict[str, list[dict[str, Any]]], data: str) -> str:
    ours, theirs = (_medians(runs[side]) for side in ("ours", "theirs"))
    alone = statistics.median(run["passes"].get("quantize-weights", 0.0) for run in runs["ours"])
    peak = f"{theirs['peak_mb']:.0f}", f"{ours['peak_mb']:.0f}"
    return "\n".join(
        (
            f"# GPTQ of SmolLM2 on {data}, int4 in symmetric groups of 64, threads: {os.environ.get('OMP_NUM_THREADS', 'all')}",
            "",
            "Processor seconds do not depend on what else the machine does, seconds do.",
            "",
            "| | seconds | of theirs | processor seconds | of theirs | peak MB |",
            "|---|---|---|---|---|---|",
            f"| llm-compressor `oneshot` | {theirs['seconds']:.0f} | 1 | {theirs['cpu_seconds']:.0f} | 1 | {peak[0]} |",
            f"| qcompile, the pass alone | {alone:.0f} | {alone / theirs['seconds']:.2f} | | | {peak[1]} |",
            f"| qcompile, all of `compile` | {_beside(ours, theirs, 'seconds')} | {_beside(ours, theirs, 'cpu_seconds')} | {peak[1]} |",
        )
    )


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "peak_mb")}


def _beside(ours: dict[str, float], theirs: dict[str, float], key: str) -> str:
    return f"{ours[key]:.0f} | {ours[key] / theirs[key]:.2f}"


if __name__ == "__main__":
    main()
