"""What a dump costs: compilations with and without one by turns, in one process, and the share of the time that the dump takes.

    python -m benchmarks.dump_cost [--model PATH] [--targets cpu-int4 cpu-w8a8] [--recipe nearest] [--runs 3] [--out FILE]

The model is SmolLM2 unless another is given. Seconds are of the processor, with one thread, which other processes disturb less than a
clock on the wall; the fewest of all runs count, after one compilation that does not. Prints JSON; the budget is 20 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qcompile
from qcompile.dump.instrument import DumpInstrument
from qcompile.frontend.pinned import smollm2_path

BUDGET = 0.2


def seconds(model: Path, target: str, recipe: str, dump: Path | None) -> float:
    """Of one compilation."""
    gc.collect()
    started = time.process_time()
    qcompile.compile(model, target, recipe=recipe, max_context=512, dump=dump, engine="torch_cpu")
    return time.process_time() - started


class Clock:
    """Adds up the seconds that are spent in the instrument itself."""

    def __init__(self) -> None:
        """Wrap its methods."""
        self.seconds = 0.0
        for name in ("__init__", "before", "after", "finish"):
            setattr(DumpInstrument, name, self._timed(getattr(DumpInstrument, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.process_time() - started

        return timed


def measure(model: Path, target: str, recipe: str, runs: int, clock: Clock) -> dict[str, Any]:
    """The least seconds without and with a dump, of the dump alone, and the size of its files."""
    seconds(model, target, recipe, None)  # imports, caches of files and of the compiler of kernels
    plain, dumped, inside = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(runs):
            plain.append(seconds(model, target, recipe, None))
            clock.seconds = 0.0
            dumped.append(seconds(model, target, recipe, Path(directory)))
            inside.append(clock.seconds)
        size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    return {
        "target": target, "recipe": recipe, "runs": runs, "without_s": round(min(plain), 2), "with_s": round(min(dumped), 2),
        "in_dump_s": round(min(inside), 2), "share": round(min(inside) / min(plain), 3), "dump_bytes": size,
        "within_budget": min(inside) <= BUDGET * min(plain),
    }  # fmt: skip


def main() -> None:
    """Measure each target and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--targets", nargs="+", default=["cpu-int4", "cpu-w8a8"])
    parser.add_argument("--recipe", default="nearest")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for one another count as time of the processor
    clock = Clock()
    model = options.model or smollm2_path()
    rows = [measure(model, target, options.recipe, options.runs, clock) for target in options.targets]
    head = {"model": model.name, "torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    text = json.dumps({**head, "results": rows}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
