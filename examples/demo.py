"""Compile a real language model, let it speak from the artifact, and show what each step did and cost.

Needs the network once (98 MB, cached) or SmolLM2's GGUF file in the cache; runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.dump.reader import Dump
from qcompile.dump.tables import format_bytes
from qcompile.errors import QCompileError
from qcompile.frontend.pinned import smollm2_path
from qcompile.runtime.cache_layers import bits_per_number

PROMPT = "Explain in two sentences what a compiler does."
WINDOWS, LENGTH = 4, 128
"""Enough for two digits of a perplexity, few enough that nobody waits for the measurement."""

CALIBRATION = ("--num-calibration-samples", "16", "--max-seq-length", "256")
"""A few windows of the packaged text: an eighth of what is used by default, for a demonstration that does not keep anybody waiting."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
"""One thread unless the caller says otherwise: on two busy cores a second one made decoding five times slower, on idle ones no faster."""


def main(arguments: list[str] | None = None) -> None:
    """Run the demonstration: compile, chat, evaluate, one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep artifact and dump here (default: a temporary directory)")
    parser.add_argument("--target", default="cpu-int4", help="such as cpu-int4-kv4; default: cpu-int4")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        _demonstrate(options.out or Path(scratch), options.target)


def _demonstrate(out: Path, target: str) -> None:
    model, artifact, dump = str(smollm2_path()), out / "artifact", out / "dump"
    started = time.perf_counter()
    _qcompile("compile", model, "--target", target, "-o", str(artifact), "--dump", str(dump), "--check", "--overwrite", *CALIBRATION)
    _qcompile("run", str(artifact), "--chat", "-n", "64", "--prompt", PROMPT)
    compiled = qcompile.load(artifact)
    tokens = _save_tokens(compiled, out / "tokens.npy")
    scores = _json("eval", str(artifact), "--tokens", str(tokens), "--reference", model)
    bench = _json("bench", str(artifact))
    results = [*_results(scores, bench), *_cache(compiled)]
    Console(width=100).print(_table(dump, bench["target"], results, time.perf_counter() - started))


def _qcompile(*arguments: str) -> None:
    """A command as a user types it, shown and run with its output on this terminal."""
    print(f"\n$ qcompile {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "qcompile.cli", *arguments], check=True, env=ENVIRONMENT)


def _json(*arguments: str) -> dict[str, Any]:
    print(f"\n$ qcompile {' '.join(arguments)} --json", flush=True)
    command = [sys.executable, "-m", "qcompile.cli", *arguments, "--json"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    values: dict[str, Any] = json.loads(run.stdout)
    return values


def _save_tokens(compiled: CompiledModel, path: Path) -> Path:
    import numpy as np

    from qcompile.evaluation import packaged_tokens, tokenizer_of

    tokens = packaged_tokens(tokenizer_of(compiled.assets), "evaluation", length=LENGTH, windows=WINDOWS)
    np.save(path, tokens.numpy())
    return path


def _table(dump: Path, target: str, results: list[tuple[str, str]], seconds: float) -> Table:
    """Passes first, then what came of them."""
    threads = f"OMP_NUM_THREADS={ENVIRONMENT['OMP_NUM_THREADS']}"
    table = Table(title=f"SmolLM2-135M-Instruct, {target}, {threads}, {seconds:.0f} s", title_justify="left")
    for header in ("pass", "changed", "time", "nodes", "error"):
        table.add_column(header, justify="left" if header in ("pass", "changed") else "right")
    for record in Dump.open(dump).records:
        error = "" if record.max_error is None else f"{record.max_error:.1e}"
        table.add_row(record.name, "yes" if record.changed else "no", f"{record.seconds:.2f} s", str(record.nodes_after), error)
    table.add_section()
    for name, value in results:
        table.add_row(name, "", "", value, "")
    return table


def _results(scores: dict[str, Any], bench: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("weights", format_bytes(bench["weight_bytes"])),
        ("bits per weight", f"{bench['bits_per_weight']:.3f}"),
        ("perplexity, float", f"{scores['reference_perplexity']:.2f}"),
        ("perplexity, compiled", f"{scores['perplexity']:.2f}"),
        ("KL from float (nats)", f"{scores['kl']:.3f}"),
        ("prefill tokens/s", f"{bench['prefill_tokens_per_second']:.0f}"),
        ("decode tokens/s", f"{bench['decode_tokens_per_second']:.1f}"),
        ("peak memory", format_bytes(bench["peak_memory_bytes"])),
    ]


def _cache(compiled: CompiledModel) -> list[tuple[str, str]]:
    """What a sequence takes: `qcompile inspect` shows it layer by layer."""
    layers = compiled.cache_layers
    rows = compiled.kv_bytes_per_sequence
    return [
        ("cache of a token", format_bytes(compiled.kv_bytes_per_token)),
        *([("cache of a sequence besides", format_bytes(rows))] if rows else []),
        ("bits per cached number", f"{bits_per_number(layers):.3f}"),
    ]


if __name__ == "__main__":
    try:
        main()
    except QCompileError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
