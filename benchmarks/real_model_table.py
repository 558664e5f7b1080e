"""Models that are no language model, compiled to 8 and 4 bits, beside the float model on inputs that calibration did not see.

    python -m benchmarks.real_model_table [--targets cpu-w8a8 cpu-w4a16] [--models whisper minilm efficientnet]

Needs transformers, and for the photographs scikit-image. Figures: the largest error over the largest output (`max`), the root mean
square of the error over that of the output (`rms`), and how often both choose the same: the next token, the nearest other sentence,
the class of an image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import qcompile
from benchmarks.real_models import RealModel, efficientnet, minilm, whisper

MODELS: dict[str, Callable[[], RealModel]] = {"whisper": whisper, "minilm": minilm, "efficientnet": efficientnet}
RESULTS = Path(__file__).parent / "results" / "real_models.md"
HEADER = "| model | target | max error | rms error | same choice | MB | compile s |\n|---|---|---|---|---|---|---|"


def main() -> None:
    """Compile each model for each target and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=["cpu-w8a8", "cpu-w4a16"])
    options = parser.parse_args()
    rows = _known()
    print(HEADER)
    for name in options.models:
        model = MODELS[name]()
        with torch.no_grad():
            expected = [model.module(**inputs) for inputs in model.evaluation]
        for target in options.targets:
            rows[name, target] = row(name, model, target, expected)
            print(rows[name, target], flush=True)
    text = "\n".join([HEADER, *(rows[key] for key in sorted(rows, key=lambda key: list(MODELS).index(key[0])))])
    RESULTS.write_text(f"# Models that are no language model\n\n`python -m benchmarks.real_model_table`\n\n{text}\n", encoding="utf-8")


def _known() -> dict[tuple[str, str], str]:
    """Rows of earlier runs by model and target: what is not asked for keeps its row."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    cells = [(line, [cell.strip() for cell in line.split("|")]) for line in lines if line.startswith("| ")]
    return {(cell[1], cell[2]): line for line, cell in cells if cell[1] in MODELS}


def row(name: str, model: RealModel, target: str, expected: list[Tensor]) -> str:
    """One line of the table."""
    started = time.perf_counter()
    compiled = qcompile.compile(
        model.module, target, example_inputs=model.calibration[0], calibration=model.calibration, engine="torch_cpu"
    )
    seconds = time.perf_counter() - started
    got = [compiled(**inputs) for inputs in model.evaluation]
    error = torch.cat([(a - b).flatten() for a, b in zip(got, expected, strict=True)])
    output = torch.cat([b.flatten() for b in expected])
    same = choices(name, torch.cat([a.flatten(0, -2) for a in got])) == choices(name, torch.cat([b.flatten(0, -2) for b in expected]))
    size = sum(constant.nbytes for constant in compiled.graph.constants.values()) / 1e6
    largest, rms = error.abs().max() / output.abs().max(), error.pow(2).mean().sqrt() / output.pow(2).mean().sqrt()
    return f"| {name} | {target} | {largest:.4f} | {rms:.4f} | {same.float().mean():.3f} | {size:.1f} | {seconds:.0f} |"


def choices(name: str, outputs: Tensor) -> Tensor:
    """What a user takes from rows of outputs: the greatest entry, or for sentences the nearest other one."""
    if name != "minilm":
        return outputs.argmax(-1)
    return (outputs @ outputs.T).fill_diagonal_(-2).argmax(-1)


if __name__ == "__main__":
    main()
