"""The table of cache formats: bits of storage against the distance from the float model, beside other libraries' caches.

    python -m benchmarks.cache_accuracy --tokens EVAL.npy --calibration CALIB.npy --formats kv8 kv4-kivi:window=128,sinks=4
        [--windows N] [--peers PYTHON] [--out ROWS.jsonl]
    python -m benchmarks.cache_accuracy --from ROWS.jsonl [--figure FIGURE.svg]

A format is a cache of `qcompile targets` and options of `qcompile.compile`, `cache_` left out. SmolLM2 is compiled as `cpu-fp32-FORMAT`:
weights stay float, only the cache is packed. Bits count everything that a sequence of 4096 tokens keeps, over its keys and values. A row is
written to the file as soon as it is measured; of rows of one name the last counts. `--peers` is the interpreter of an environment with
`transformers hqq optimum-quanto`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import qcompile
from benchmarks.accuracy import run_json
from benchmarks.accuracy_model import write_directory
from benchmarks.accuracy_peers import read
from benchmarks.cache_figure import KL, Measure, draw
from benchmarks.cache_peers import PEERS
from benchmarks.cache_scores import FloatModel, score
from qcompile.compiled import CompiledModel
from qcompile.errors import QCompileError
from qcompile.evaluation import logits_of
from qcompile.frontend.pinned import smollm2_path
from qcompile.quant.cache_format import CACHES
from qcompile.runtime.cache_layers import CacheLayer, bits_per_number, folded

HEADER = "| cache | format | bits per number | KL | KL, second half | perplexity | top-1 | seconds |\n|---|---|--:|--:|--:|--:|--:|--:|"
_OF_CACHES = ("keys", "values", "sinks", "window", "before_positions", "bits")
_RUNS = 4
"""Runs of layers that a row shows at most."""


@dataclass(frozen=True)
class Entry:
    """A format as given: `name:option=value,option=value`."""

    text: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Entry:
        """Take the text apart.

        Raises:
            ValueError: for a name that no cache has, or an option without a value.
        """
        name, _, rest = text.partition(":")
        if name not in CACHES:
            raise ValueError(f"format {text!r}: expected one of {', '.join(CACHES)}, got {name!r}")
        options = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"format {text!r}: expected option=value, got {part!r}")
            options[f"cache_{key}" if key in _OF_CACHES else key] = _value(value)
        return cls(text, name, options)

    @property
    def target(self) -> str:
        """What it is compiled for."""
        return "cpu-fp32" if self.name == "kv" else f"cpu-fp32-{self.name}"

    def compile(self, model: Path, calibration: Path | None, context: int) -> CompiledModel:
        """Do it."""
        return qcompile.compile(model, self.target, calibration=calibration, max_context=context, engine="torch_cpu", **self.options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    """Measure what was asked for, or show what was measured."""
    options = _options()
    tell(options, HEADER, line, KL, _measured(options))


def tell(
    options: argparse.Namespace, header: str, line: Callable[[Mapping[str, Any]], str], measure: Measure, measured: Iterable[dict[str, Any]]
) -> None:  # fmt: skip
    """Show the rows of a file and draw them by `measure`, or print and keep each row as soon as it is measured."""
    if options.rows is not None:
        rows = read_rows(options.rows)
        print("\n".join(untimed(text) for text in (*header.split("\n"), *map(line, rows))))
        if options.figure is not None:
            options.figure.write_text(draw(rows, measure), encoding="utf-8")
        return
    print(header, flush=True)
    for row in measured:
        print(line(row), flush=True)
        append(options.out, row)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, help="token ids [windows, length] to measure on (.npy)")
    parser.add_argument("--calibration", type=Path, help="token ids for formats that are calibrated (.npy); default: the packaged text")
    parser.add_argument("--formats", nargs="*", type=format_of, default=[], metavar="FORMAT")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory in place of SmolLM2")
    parser.add_argument("--windows", type=int, help="use this many windows only")
    parser.add_argument("--peers", type=Path, help="interpreter of an environment that has the other libraries")
    parser.add_argument("--peer-rows", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out", type=Path, help="append rows to this file (.jsonl)")
    parser.add_argument("--from", type=Path, dest="rows", help="show rows of this file, measure nothing")
    parser.add_argument("--figure", type=Path, help="draw them (.svg)")
    options = parser.parse_args()
    if options.rows is None and options.tokens is None:
        parser.error("expected --tokens to measure on, or --from with rows to show")
    if options.figure is not None and options.rows is None:
        parser.error("expected --from with --figure: a figure is drawn from rows that were measured")
    return options


def format_of(text: str) -> Entry:
    """A format given on the command line."""
    try:
        return Entry.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    path, windows = options.model or smollm2_path(), read(options.tokens, options.windows)
    if options.formats:
        reference = FloatModel(path)
        for entry in options.formats:
            yield {"cache": entry.text, "by": "qcompile"} | measure(entry, path, options.calibration, reference, windows)
    if options.peers is not None:
        with tempfile.TemporaryDirectory() as scratch:
            directory = options.model or write_directory(Path(scratch) / "model")
            for name in options.peer_rows:
                yield {"cache": name, "by": "transformers"} | run_peer(options, name, directory)


def measure(entry: Entry, model: Path, calibration: Path | None, reference: FloatModel, windows: Tensor) -> dict[str, Any]:
    """Compile and score one format; `error` says why it could not be."""
    started = time.perf_counter()
    try:
        compiled = entry.compile(model, calibration, windows.shape[1])
    except QCompileError as error:
        return {"error": str(error)}
    ready = time.perf_counter()
    scores = score(logits_of(compiled), reference.logits, windows)
    layers = compiled.cache_layers
    size = {
        "form": form(layers),
        "bits": bits_per_number(layers),
        "bytes_per_token": sum(layer.bytes_per_token for layer in layers),
        "bytes_per_sequence": sum(layer.bytes_per_sequence for layer in layers),
        "table_bytes": sum(layer.table_bytes for layer in layers),
    }
    return {**size, **scores, "compile_seconds": ready - started, "seconds": time.perf_counter() - ready}


def form(layers: Sequence[CacheLayer]) -> str:
    """Formats of keys and values, run by run of equal layers."""
    runs = [(name, _form(layer)) for name, layer in folded(layers)]
    if len({text for _, text in runs}) == 1:
        return runs[0][1]
    left_out = [f"and {len(runs) - _RUNS} more"] if len(runs) > _RUNS else []
    return "; ".join([*(f"{name}: {text}" for name, text in runs[:_RUNS]), *left_out])


def _form(layer: CacheLayer) -> str:
    stored = layer.keys if layer.keys == layer.values else f"{layer.keys} / {layer.values}"
    kept = [f"{count} {name}" for name, count in (("first", layer.sinks), ("recent", layer.window)) if count]
    return f"{stored}, {' + '.join(kept)}" if kept else stored


def run_peer(options: argparse.Namespace, name: str, model: Path) -> dict[str, Any]:
    """What the other library's process measured; `error` is the last line of its complaint."""
    windows = () if options.windows is None else ("--windows", str(options.windows))
    command = ("-m", "benchmarks.cache_peers", name, "--model", str(model), "--tokens", str(options.tokens.resolve()), *windows)
    measured = run_json((str(options.peers), *command))
    return {"error": measured} if isinstance(measured, str) else measured


def append(path: Path | None, row: Mapping[str, Any]) -> None:
    """Write a row behind those of a file, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; of those of one name the last, where the first one stood."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        found[row["by"], row["cache"]] = row
    return list(found.values())


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    name = f"`{row['cache']}`" if row["by"] == "qcompile" else row["by"]
    if "error" in row:
        return f"| {name} | failed: {row['error'][:200]} | | | | | | |"
    scores = f"{row['kl']:.4f} | {row['kl_late']:.4f} | {row['perplexity']:.2f} | {100 * row['top1']:.1f} %"
    return f"| {name} | {row['form']} | {row['bits']:.3f} | {scores} | {row['seconds']:.0f} |"


def untimed(text: str) -> str:
    """A line of the table without seconds, which say something beside others of the same run only."""
    return "|".join(text.split("|")[:-2]) + "|"


if __name__ == "__main__":
    main()
