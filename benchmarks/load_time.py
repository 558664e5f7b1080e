"""Seconds until an artifact answers: loading, preparing the engine, the first token; each run in a fresh process.

    python benchmarks/load_time.py ARTIFACT [--runs 5] [--threads 1] [--engine native]

Torch is imported before the clock starts. `ready_s` is from there until a token can be computed: the package imported, the artifact
checked, constants packed, the decode step bound. `ready_cpu_s` is the processor time of the same, which others on the machine disturb
less. Files are in the page cache after the first run, which is printed like the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)


def measure(path: str, threads: int, engine: str | None) -> dict[str, float]:
    """Seconds of each stage and the greatest memory, in this process."""
    import torch

    torch.set_num_threads(threads)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    import qcompile

    imported = time.perf_counter()
    model = qcompile.load(path, max_batch=1, max_context=256, engine=engine)
    loaded = time.perf_counter()
    model.engine.prepare()
    prepared, prepared_cpu = time.perf_counter(), time.process_time()
    model.generate([list(PROMPT)], max_new_tokens=1, ignore_eos=True)
    first = time.perf_counter()
    model.generate([list(PROMPT)], max_new_tokens=1, ignore_eos=True)
    second = time.perf_counter()
    return {
        "import_qcompile_s": imported - begin,
        "load_s": loaded - imported,
        "prepare_s": prepared - loaded,
        "ready_s": prepared - begin,
        "ready_cpu_s": prepared_cpu - begin_cpu,
        "first_token_s": first - prepared,
        "second_prompt_s": second - first,
        "memory_mib": _status("VmRSS"),
        "memory_not_of_files_mib": _status("RssAnon"),
    }


def _status(name: str) -> float:
    """Memory of this process as Linux counts it, in MiB; nan where it does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), float("nan"))


def main() -> None:
    """Run `measure` in fresh processes and print every run and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engine", help="in place of the artifact's own")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.artifact, options.threads, options.engine)))
        return
    command = [sys.executable, __file__, options.artifact, "--once", "--threads", str(options.threads)]
    command += ["--engine", options.engine] if options.engine else []
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(options.runs)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(json.dumps({"artifact": options.artifact, "threads": options.threads, "runs": runs, "median": medians}, indent=1))


if __name__ == "__main__":
    main()
