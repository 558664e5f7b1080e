"""What exporting a large model takes: memory of writing and of checking, size of the files, logits of onnxruntime beside our own.

    python -m benchmarks.onnx_large [--layers 26] [--scheme int8] [--profiles portable ort] [--scratch DIR] [--out RESULT.json]

A llama with random weights is written as a Hugging Face directory, compiled with `recipe="nearest"` for `cpu-SCHEME`, and saved: its
packed weights take more than 1 GiB. Then each profile is exported from the artifact in a process of its own, first without and then with
the comparison by onnxruntime, which holds the whole model. Memory is the peak of what is resident (VmHWM), and of what is resident and no
page of a file (RssAnon, looked at every 5 ms), each less what there was before. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import qcompile

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
HEADER = "| step | seconds | peak | without pages of files | files / weights | error |\n|---|--:|--:|--:|--:|--:|"
PAUSE = 0.005


def main() -> None:
    """Run the steps, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--scheme", default="int8", help="of the target: int8, int4, …")
    parser.add_argument("--profiles", nargs="+", default=["portable", "ort"])
    parser.add_argument(
        "--scratch", type=Path, help="where model, artifact and files go (about 6 GB), and stay; default: a temporary directory"
    )
    parser.add_argument("--out", type=Path, help="write the result to this file (.json)")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step[0]](options, *options.step[1:])))
        return
    with tempfile.TemporaryDirectory() as made:
        options.scratch = options.scratch or Path(made)
        options.scratch.mkdir(parents=True, exist_ok=True)
        rows = [{"step": " ".join(step), **apart(options, step)} for step in steps(options)]
    print(HEADER)
    for row in rows:
        print(line(row))
    if options.out is not None:
        about = {"date": datetime.date.today().isoformat(), "layers": options.layers, "scheme": options.scheme, **SHAPE}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def steps(options: argparse.Namespace) -> Iterator[list[str]]:
    """Model and artifact, unless they are there, then both ways of exporting for each profile."""
    if not (options.scratch / "model").exists():
        yield ["model"]
    if not (options.scratch / "artifact").exists():
        yield ["compile"]
    for profile in options.profiles:
        yield ["write", profile]
        yield ["check", profile]


def apart(options: argparse.Namespace, step: list[str]) -> dict[str, Any]:
    """One step in a process of its own: what it prints last."""
    command = [sys.executable, "-m", "benchmarks.onnx_large", "--layers", str(options.layers), "--scheme", options.scheme]
    done = subprocess.run([*command, "--scratch", str(options.scratch), "--step", *step], stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(step), row, file=sys.stderr)
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    share = f"{row['file_bytes'] / row['weight_bytes']:.3f}" if "file_bytes" in row else ""
    error = f"{row['error']:.1e}" if row.get("error") is not None else ""
    peaks = " | ".join(f"{row[name] / 1e6:.0f} MB" for name in ("peak_bytes", "anonymous_bytes"))
    return f"| {row['step']} | {row['seconds']:.1f} | {peaks} | {share} | {error} |"


# Steps


def make_model(options: argparse.Namespace) -> dict[str, Any]:
    """A directory with random weights in bfloat16, a file for each layer."""
    with measured() as row:
        directory = options.scratch / "model"
        config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=options.layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
        directory.mkdir()
        files: dict[str, dict[str, torch.Size]] = {}
        for name, shape in shapes.items():
            parts = name.split(".")
            files.setdefault(f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors", {})[name] = shape
        for file, held in files.items():
            save_file({name: random_weight(shape) for name, shape in held.items()}, directory / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        config.save_pretrained(directory)
    return row


def random_weight(shape: torch.Size) -> torch.Tensor:
    """Of variance 1 / K, so that numbers keep their size from layer to layer; ones for norms."""
    made = torch.randn(shape, dtype=torch.float32).div_(shape[-1] ** 0.5) if len(shape) > 1 else torch.ones(shape)
    return made.to(torch.bfloat16)


def compile_model(options: argparse.Namespace) -> dict[str, Any]:
    """The artifact: constants are handles on the directory's files until they are written."""
    with measured() as row:
        made = qcompile.compile(options.scratch / "model", f"cpu-{options.scheme}", recipe="nearest", max_context=64, engine="torch_cpu")
        made.save(options.scratch / "artifact")
    return {**row, "weight_bytes": made.weight_bytes, "largest": largest(made)}


def largest(model: qcompile.CompiledModel) -> int:
    """Bytes of the largest constant."""
    return max(constant.nbytes for constant in model.contents.constants.values())


def write(options: argparse.Namespace, profile: str, *, compare: bool = False) -> dict[str, Any]:
    """Export, onnx's checker included."""
    model = qcompile.load(options.scratch / "artifact")
    model.graph  # noqa: B018  built before anything is measured
    import onnxruntime  # noqa: F401  the same

    with measured() as row:
        written = model.export_onnx(options.scratch / f"{profile}.onnx", profile=profile, overwrite=True, compare=compare)
    sizes = {"file_bytes": written.bytes, "weight_bytes": model.weight_bytes, "largest": largest(model), "files": len(written.files)}
    return {**row, **sizes, "error": written.error, "not_run": written.not_run}


def check(options: argparse.Namespace, profile: str) -> dict[str, Any]:
    """The same, with the comparison by onnxruntime: two prompts, and a token behind each."""
    return write(options, profile, compare=True)


STEPS = {"model": make_model, "compile": compile_model, "write": write, "check": check}


# Memory


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Seconds and peaks of memory in bytes, less what there was before."""
    row: dict[str, Any] = {}
    before, seen, over = status(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(seen, over))
    watcher.start()
    started = time.perf_counter()
    try:
        yield row
    finally:
        row["seconds"] = time.perf_counter() - started
        over.set()
        watcher.join()
    row["peak_bytes"], row["anonymous_bytes"] = status()["VmHWM"] - before["VmRSS"], seen[0] - before["RssAnon"]


def watch(seen: list[int], over: threading.Event) -> None:
    """Keep the largest RssAnon."""
    while not over.wait(PAUSE):
        seen[0] = max(seen[0], status()["RssAnon"])


def status() -> dict[str, int]:
    """Bytes by name, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(value.split()[0]) << 10 for name, _, value in (text.partition(":") for text in lines) if value.endswith(" kB")}


if __name__ == "__main__":
    main()
