"""What the rows of `benchmarks.decode_cpu` decode: files and artifacts, made on the first call and kept by what they are made from.

    python -m benchmarks.decode_models compile FILE.gguf OUT '{"target": "cpu-int4", "recipe": "nearest"}'
    python -m benchmarks.decode_models distance FLOAT.gguf OTHER.gguf|ARTIFACT --eval TOKENS.npy --windows 4

`distance` prints the KL of the next-token distribution from the float file, in nats a token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy import ROOT, run_json
from qcompile.kept import cache_directory

KEPT = cache_directory() / "benchmarks"
_SOURCES = ("qcompile", "passes", "codegen", "runtime")


def kept(name: str, key: object, make: Callable[[Path], object]) -> Path:
    """The file or folder called `name` for this key; `make` writes it where it is not there yet."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = KEPT / f"{digest}-{name}"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            made = Path(scratch) / name
            make(made)
            made.replace(path)
    return path


def identity(path: Path) -> list[str]:
    """What tells a file from another: its name, size and time."""
    status = path.stat()
    return [path.name, str(status.st_size), str(status.st_mtime_ns)]


def compiled(file: Path, options: Mapping[str, Any], name: str) -> Path:
    """The artifact that this code makes of a file, compiled in a process of its own."""
    sources = [path for room in _SOURCES for ending in ("*.py", "*.h") for path in (ROOT / room).rglob(ending)]
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(set(sources)))).hexdigest()

    def make(out: Path) -> None:
        print(f"compiling {file.name}: {json.dumps(dict(options))}", flush=True)
        _run("compile", str(file), str(out), json.dumps(dict(options)))

    return kept(name, [identity(file), dict(options), code], make)


def distance(reference: Path, model: Path, text: Path, windows: int) -> dict[str, Any]:
    """KL and perplexity of a GGUF file in llama.cpp, or of an artifact in the native engine; kept as well."""

    def make(out: Path) -> None:
        arguments = ["distance", str(reference), str(model), "--eval", str(text.resolve()), "--windows", str(windows)]
        measured = run_json([sys.executable, "-m", "benchmarks.decode_models", *arguments])
        if isinstance(measured, str):
            sys.exit(f"benchmarks.decode_models: {model.name}: expected a distance from {reference.name}, got: {measured}")
        out.write_text(json.dumps(measured))

    found: dict[str, Any] = json.loads(
        kept("distance.json", [identity(reference), identity(model), identity(text), windows], make).read_text()
    )
    return found


def _run(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "benchmarks.decode_models", *arguments], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"benchmarks.decode_models {arguments[0]}: expected it to work, got a failure; see its messages above")


def _compile(file: Path, out: Path, options: dict[str, Any]) -> None:
    import qcompile

    target = options.pop("target")
    qcompile.compile(file, target, engine="native", max_batch=1, **options).save(out)


def _distance(reference: Path, model: Path, text: Path, windows: int) -> dict[str, Any]:
    import numpy as np
    import torch

    import qcompile
    from qcompile.evaluation import evaluate, logits_of

    tokens = torch.from_numpy(np.load(text).astype(np.int64))[:windows]

    def write(out: Path) -> None:
        exact = qcompile.compile(reference, "cpu-fp32", max_batch=1, max_context=tokens.shape[1], engine="torch_cpu")
        with out.open("wb") as file:
            np.save(file, torch.cat([logits_of(exact)(window[None]) for window in tokens]).numpy())

    exact = np.load(kept("logits.npy", [identity(reference), tokens.tolist()], write), mmap_mode="r")
    if model.is_dir():
        measured = logits_of(qcompile.load(model, engine="native", max_context=tokens.shape[1]))
    else:
        measured = _llama_logits(model, tokens.shape[1])
    sums = {"kl": 0.0, "perplexity": 0.0, "float_perplexity": 0.0}
    for place, window in enumerate(tokens):
        result = evaluate(measured, window[None], lambda _, place=place: torch.from_numpy(exact[place : place + 1].copy()))
        found = (result.kl, math.log(result.perplexity), math.log(result.reference_perplexity))
        sums = {name: total + float(value) for (name, total), value in zip(sums.items(), found, strict=True)}
    means = {name: total / windows for name, total in sums.items()}
    return {name: mean if name == "kl" else math.exp(mean) for name, mean in means.items()} | {"windows": windows}


def _llama_logits(model: Path, length: int) -> Callable[[Any], Any]:
    import llama_cpp
    import torch

    peer = llama_cpp.Llama(str(model), n_ctx=length, n_batch=length, verbose=False, logits_all=True)

    def logits(tokens: Any) -> Any:
        found = []
        for window in tokens.tolist():
            peer.reset()
            peer.eval(window)
            found.append(torch.from_numpy(peer.scores[: len(window)].copy()))
        return torch.stack(found)

    return logits


def main() -> None:
    """Compile, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "distance"))
    parser.add_argument("source", type=Path)
    parser.add_argument("other", type=Path, help="where an artifact goes, or what is measured")
    parser.add_argument("options", nargs="?", default="{}", help="target and options of qcompile.compile as JSON")
    parser.add_argument("--eval", type=Path, help="token ids [windows, length] to measure on (.npy)")
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    if options.what == "compile":
        _compile(options.source, options.other, json.loads(options.options))
    else:
        print(json.dumps(_distance(options.source, options.other, options.eval, options.windows)))


if __name__ == "__main__":
    main()
