"""One row of the accuracy table by qcompile: one call of `qcompile.compile`, then measured beside the float model.

    python -m benchmarks.accuracy_ours ROW --model DIR --calib TOKENS.npy --eval TOKENS.npy

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qcompile
from benchmarks.accuracy_peers import distance, read
from qcompile.compiled import CompiledModel
from qcompile.evaluation import logits_of
from qcompile.passes.pipelines import default_pipeline, pipeline_text
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.target import parse_target

_NEAREST = default_pipeline(parse_target("cpu-int4"), "nearest")


@dataclass(frozen=True)
class Ours:
    """One compilation: the target, and options of `compile`."""

    target: str
    options: dict[str, Any] = field(default_factory=dict)

    def command(self, model: str, calibration: str) -> str:
        """The call as a user writes it."""
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f'qcompile.compile("{model}", "{self.target}", calibration="{calibration}"{options})'

    def compile(self, model: Path, calibration: Path, windows: int | None = None) -> CompiledModel:
        """Do it; what is lost does not depend on who multiplies, so no library is built."""
        return qcompile.compile(
            model,
            self.target,
            calibration=calibration,
            num_calibration_samples=windows,
            max_context=512,
            engine="torch_cpu",
            **self.options,
        )


GPTQ = pipeline_text([QuantizeWeights(rounding="gptq") if step.name == "quantize-weights" else step for step in _NEAREST])
"""Plain GPTQ, nothing before it: what the times of libraries are compared on."""

OURS: dict[str, Ours] = {
    "w4": Ours("cpu-int4"),
    "w4-nearest": Ours("cpu-int4", options={"recipe": "nearest"}),
    "w4-gptq": Ours("cpu-int4", options={"passes": GPTQ}),
    "w3": Ours("cpu-int3"),
    "w2": Ours("cpu-int2"),
    "w8a8": Ours("cpu-w8a8"),
    "w4a8": Ours("cpu-w4a8-kv16"),
    "w4a4-kv4": Ours("cpu-w4a4-kv4-token"),
}


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=OURS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, help="without it nothing is measured but time and memory")
    parser.add_argument("--windows", type=int, help="calibrate and measure on this many windows only")
    options = parser.parse_args()
    started, used = time.perf_counter(), time.process_time()
    compiled = OURS[options.row].compile(options.model, options.calib, options.windows)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured = {"bits": compiled.bits_per_weight, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}
    measured["passes"] = {record.name: round(record.seconds, 1) for record in compiled.records if record.seconds > 1}
    if options.eval is not None:
        measured |= distance(logits_of(compiled), options.model, read(options.eval, options.windows))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
