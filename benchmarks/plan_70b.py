"""Plan the compilation of a 70B-shaped llama from its configuration alone; print and write down seconds and peak memory.

    python -m benchmarks.plan_70b [--target sm90-int4] [--recipe best] [--out FILE.json]

No weight exists, and nothing stands in for one: every pass runs over constants of which only shapes are known.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import transformers

import qcompile
from benchmarks.trace_70b import SHAPE


def main() -> None:
    """Print one line, and the plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm90-int4")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    config = transformers.LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"])
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        started, worked = time.perf_counter(), time.process_time()
        plan = qcompile.plan(Path(directory) / "config.json", chosen.target, recipe=chosen.recipe, max_context=8192)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(plan.report())
    print(f"planned in {seconds:.1f} s ({cpu_seconds:.1f} s of one core), peak {peak / 1e9:.2f} GB")
    if chosen.out is not None:
        written = {name: value for name, value in plan.to_dict().items() if name not in ("coverage", "cache", "model")}
        measured = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": platform.machine(),
            "command": " ".join(["python -m benchmarks.plan_70b", *sys.argv[1:]]),
            "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "load": os.getloadavg(), "peak_memory_bytes": peak,
            "shape": SHAPE, "recipe": chosen.recipe, "left_alone": len(plan.left_alone), "operators": len(plan.coverage),
        }  # fmt: skip
        chosen.out.write_text(json.dumps(measured | {"plan": written}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
