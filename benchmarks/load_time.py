"""Seconds until an artifact answers: loading, preparing the engine, the first token; each run in a fresh process.

    python benchmarks/load_time.py ARTIFACT [--runs 5] [--threads 1]

Torch is imported before the clock starts. Files are in the page cache after the first run, which is printed like the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)


def measure(path: str, threads: int) -> dict[str, float]:
    """Seconds of each stage, in this process."""
    import torch

    torch.set_num_threads(threads)
    begin = time.perf_counter()
    import qcompile

    imported = time.perf_counter()
    model = qcompile.load(path, max_batch=1, max_context=256)
    loaded = time.perf_counter()
    model.engine.prepare()
    prepared = time.perf_counter()
    model.generate([list(PROMPT)], max_new_tokens=1, ignore_eos=True)
    first = time.perf_counter()
    model.generate([list(PROMPT)], max_new_tokens=1, ignore_eos=True)
    second = time.perf_counter()
    return {
        "import_qcompile_s": imported - begin,
        "load_s": loaded - imported,
        "prepare_s": prepared - loaded,
        "first_token_s": first - prepared,
        "second_prompt_s": second - first,
    }


def main() -> None:
    """Run `measure` in fresh processes and print every run and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.artifact, options.threads)))
        return
    command = [sys.executable, __file__, options.artifact, "--once", "--threads", str(options.threads)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(options.runs)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(json.dumps({"artifact": options.artifact, "threads": options.threads, "runs": runs, "median": medians}, indent=1))


if __name__ == "__main__":
    main()
