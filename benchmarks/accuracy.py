"""The accuracy table: what low-bit weights, activations and caches cost, beside other libraries, on the same windows in one run.

    python -m benchmarks.accuracy --calib CALIB.npy --eval EVAL.npy [--rotated SEED] [--rows w4 w3] [--peers PYTHON] [--windows N]

Each entry runs in a process of its own (seconds and peak memory are those of quantizing alone). `--peers` is the interpreter of an
environment with `llmcompressor auto-round torchao hqq nvidia-modelopt`; without it only our rows run. `--rotated` puts the model into
another basis first: the same function with other weights, to show that nothing is fitted to the original ones. KL is that of the
next-token distribution against the float model in nats; embedding and head stay float.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy_model import write_directory
from benchmarks.accuracy_ours import OURS

ROOT = Path(__file__).resolve().parent.parent
HEADER = "| {} | bits | KL | perplexity | seconds | peak MB |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """A block of the table: one setting, what it is to reach, our entry and those of other libraries."""

    name: str
    at_most: float
    ours: tuple[str, ...]
    peers: tuple[str, ...]


ROWS: dict[str, Row] = {
    "w4": Row(
        "weights 4.25", 0.095, ("w4", "w4-nearest"),
        (
            "llm-compressor-gptq-w4", "model-optimizer-awq-w4", "auto-round-w4", "torchao-nearest-w4", "torchao-hqq-w4", "hqq-w4",
        ),
    ),
    "w3": Row("weights 3.25", 0.33, ("w3",), ("llm-compressor-gptq-w3", "auto-round-w3", "torchao-hqq-w3")),
    "w2": Row("weights 2.28", 1.5, ("w2",), ("hqq-w2",)),
    "w8a8": Row("W8A8 dynamic", 0.0050, ("w8a8",), ("llm-compressor-smoothquant-w8a8", "torchao-w8a8")),
    "w4a8": Row("W4.25 A8", 0.105, ("w4a8",), ("torchao-w4a8",)),
    "w4a4-kv4": Row("W4.25 A4.25 KV4.5", 0.44, ("w4a4-kv4",), ()),
}  # fmt: skip


def main() -> None:
    """Run what was asked for and write the table."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or write_directory(Path(scratch) / "model", options.rotated)
        lines = [f"# Accuracy{'' if options.rotated is None else f' at rotation {options.rotated}'}", "", _command(options), ""]
        for line in _table(options, model, Path(scratch)):
            print(line, flush=True)
            lines.append(line)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", type=Path, required=True, help="token ids [windows, length] to calibrate on (.npy)")
    parser.add_argument("--eval", type=Path, required=True, help="token ids [windows, length] to measure on (.npy)")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory in place of SmolLM2")
    parser.add_argument("--rotated", type=int, metavar="SEED", help="measure at a random orthogonal basis of the residual stream")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--only", nargs="+", help="only these entries")
    parser.add_argument("--peers", type=Path, help="interpreter of an environment that has the other libraries")
    parser.add_argument("--windows", type=int, help="use this many windows of each array only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = "accuracy" if options.rotated is None else f"accuracy-rotated-{options.rotated}"
    options.out = options.out or ROOT / "benchmarks" / "results" / f"{name}.md"
    return options


def _command(options: argparse.Namespace) -> str:
    rotated = "" if options.rotated is None else f" --rotated {options.rotated}"
    windows = "" if options.windows is None else f" --windows {options.windows}"
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    data = f"--calib {options.calib.name} --eval {options.eval.name}"
    return f"`python -m benchmarks.accuracy {data}{rotated}{windows}`, threads: {threads}"


def _table(options: argparse.Namespace, model: Path, scratch: Path) -> Iterator[str]:
    for name in options.rows:
        row = ROWS[name]
        yield ""
        yield HEADER.format(f"{row.name} (at most {row.at_most:g})")
        for entry in row.ours:
            if not options.only or entry in options.only:
                command = f"**qcompile** `{OURS[entry].command('MODEL', options.calib.name)}`"
                yield _line(command, run_entry(sys.executable, "ours", entry, options, model, scratch))
        for entry in row.peers if options.peers else ():
            if not options.only or entry in options.only:
                yield _line(entry, run_entry(str(options.peers), "peers", entry, options, model, scratch))


def run_entry(python: str, side: str, entry: str, options: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any] | str:
    """What the entry's process measured, or the last line of what it complained about."""
    command: Sequence[str] = (
        python, "-m", f"benchmarks.accuracy_{side}", entry, "--model", str(model), "--calib", str(options.calib.resolve()),
        *(() if options.eval is None else ("--eval", str(options.eval.resolve()))),
        *(() if options.windows is None else ("--windows", str(options.windows))),
    )  # fmt: skip
    # An empty cache: what an earlier run has finished would not be measured.
    return run_json(command, {"QCOMPILE_CACHE": tempfile.mkdtemp(dir=scratch)})


def run_json(command: Sequence[str], variables: Mapping[str, str] | None = None) -> dict[str, Any] | str:
    """The JSON value of the last line that a command prints, run where `benchmarks` imports; the last line of its complaint if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables or {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def _line(name: str, measured: dict[str, Any] | str) -> str:
    if isinstance(measured, str):
        return f"| {name} | failed: {measured[:200]} | | | | |"
    figures = f"{measured['bits']:.2f} | {measured['kl']:.4f} | {measured['perplexity']:.2f}"
    return f"| {name} | {figures} | {measured['seconds']:.0f} | {measured['peak_mb']:.0f} |"


if __name__ == "__main__":
    main()
