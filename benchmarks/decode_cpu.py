"""Decoding and prefill on the CPU beside llama.cpp: one process per engine, the same file, the same prompts, in turn, and ratios.

    python -m benchmarks.decode_cpu [--row file] [--threads 1 2] [--tokens 64] [--repeat 7] [--model FILE.gguf]
    python -m benchmarks.decode_cpu --row rotated --eval TOKENS.npy [--windows 4]
    python -m benchmarks.decode_cpu --row billion

`file` is the published 4-bit file: llama.cpp reads its blocks, ours are lossless on it. `rotated` is the same function in another basis,
as a float file: llama.cpp quantizes it with each of its 4-bit types, ours are compiled from it until one is no further from the float
file (KL) than the closest of those. `billion` is a llama of a billion random weights, too large for any cache.

What a row needs is made on the first call and kept under `QCOMPILE_CACHE`/benchmarks. Beside tokens a second stand the bytes that a token
must move (weights that it reads, and the cache), and their share of the read bandwidth that the same run measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gguf_models
from benchmarks.accuracy import ROOT
from benchmarks.decode_engines import CONTEXT, PROMPT
from benchmarks.decode_models import compiled, distance, identity, kept
from benchmarks.read_bandwidth import OUT_OF_CACHE, read_bandwidth
from qcompile.frontend.pinned import smollm2_path
from qcompile.runtime.native.processor import CPUINFO

HEAD = {"head_format": "int8 g32 sym fp16"}
"""The published file's own: Q8_0."""
LOSSLESS = {"target": "cpu-int4", "recipe": "nearest", "weight_format": "int4 g32 min fp16", **HEAD}
"""Every value of a block in Q4_1 is a value of this format."""
NEAREST = {"target": "cpu-int4", "recipe": "nearest", "group_size": 32, **HEAD}
OURS: dict[str, list[dict[str, Any]]] = {
    "file": [{**LOSSLESS, "matmul": "fast"}, {**LOSSLESS, "matmul": "exact"}],
    "rotated": [
        {"target": "cpu-int4", "weight_format": "int4 g32 min fp16", "matmul": "fast", **HEAD},
        {"target": "cpu-int4", "weight_format": "int5 g64 sym fp16", "matmul": "fast", **HEAD},
    ],
    "billion": [{**NEAREST, "matmul": "fast"}, {**NEAREST, "matmul": "exact"}],
}
"""Row -> target and options of `qcompile.compile`. For `rotated` with as many bits as Q4_1, and with fewer than llama.cpp's Q4_K_M has
on rows of 576 columns, which it can hold in Q5_0 alone; of these, up to the first that is as close as the closest of llama.cpp's."""
PREFILL = 256


@dataclass
class Contender:
    """An engine with a model, and what is known of it before it runs."""

    name: str
    engine: str
    model: Path
    notes: dict[str, Any] = field(default_factory=dict)


class Process:
    """A contender in a process of its own."""

    def __init__(self, contender: Contender, threads: int) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "benchmarks.decode_engines", contender.engine, str(contender.model), "--threads", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        self.about = self._answer()
        self.seconds: dict[str, list[float]] = {}
        self.tokens: list[int] = []

    def ask(self, kind: str, count: int, *, counted: bool = True) -> None:
        """Let it work, and note how long it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({kind: count}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if counted:
            self.seconds.setdefault(kind, []).append(answer["seconds"] / count)
        if kind == "decode":
            self.tokens = answer["tokens"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"benchmarks.decode_cpu: {self.contender.name}: expected an answer, got none; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def measured(self, tokens: int, bandwidth: float) -> dict[str, Any]:
        """Medians, and the share of the bandwidth that decoding reaches."""
        rates = {kind: 1 / statistics.median(seconds) for kind, seconds in self.seconds.items()}
        moved = self.about["weight_bytes"] + self.about["cache_bytes"] * (len(PROMPT) + tokens / 2)
        return {
            **self.about, **self.contender.notes, "model": self.contender.model.name,
            "decode_tokens_per_second": rates["decode"], "prefill_tokens_per_second": rates["prefill"],
            "bytes_per_token": moved, "share_of_bandwidth": moved * rates["decode"] / bandwidth, "seconds_per_token": self.seconds,
        }  # fmt: skip


def ours_for(model: Path, options: argparse.Namespace) -> Iterator[Contender]:
    """Ours, compiled when they are asked for."""
    for place, settings in enumerate(map(json.loads, options.ours) if options.ours else OURS[options.row]):
        artifact = compiled(model, {"max_context": CONTEXT, **settings}, f"{options.row}-{place}")
        bits = settings.get("weight_format", "").split(" ")[0]
        name = " ".join(part for part in ("qcompile", bits, settings.get("matmul") or str(place)) if part)
        yield Contender(name, "qcompile", artifact, {"options": settings})


def file_row(options: argparse.Namespace) -> list[Contender]:
    """The published file, as both read it without loss."""
    model = options.model or smollm2_path()
    return [Contender("llama.cpp", "llama.cpp", model), *ours_for(model, options)]


def rotated_row(options: argparse.Namespace) -> list[Contender]:
    """A float file: quantized by llama.cpp in each of its types, the closest first, and by us until it is no further from the float one."""
    if options.eval is None:
        sys.exit("benchmarks.decode_cpu --row rotated: expected --eval TOKENS.npy to measure distances on, got none; name a token array")
    source = options.model or smollm2_path()
    model = kept("rotated.gguf", [identity(source), options.seed], lambda out: gguf_models.rotated(source, out, options.seed))

    def judged(contender: Contender) -> Contender:
        contender.notes |= distance(model, contender.model, options.eval, options.windows)
        print(f"{contender.name}: KL {contender.notes['kl']:.4f} {contender.notes.get('bits', '')}", flush=True)
        return contender

    peers = [_quantized(model, kind) for kind in options.types]
    peers = sorted(map(judged, peers), key=lambda contender: float(contender.notes["kl"]))
    ours: list[Contender] = []
    for made in map(judged, ours_for(model, options)):
        ours.append(made)
        if made.notes["kl"] <= peers[0].notes["kl"]:
            break
    return [*peers, *ours]


def billion_row(options: argparse.Namespace) -> list[Contender]:
    """Random weights out of every cache."""
    source = options.model or smollm2_path()
    shape = gguf_models.Shape(layers=options.layers)
    model = kept("billion.gguf", [identity(source), vars(shape)], lambda out: gguf_models.random_model(source, out, shape))
    return [_quantized(model, "Q4_0"), *ours_for(model, options)]


def _quantized(model: Path, kind: str) -> Contender:
    """What llama.cpp makes of a float file."""
    path = kept(f"{kind}.gguf", [identity(model), kind], lambda out: gguf_models.quantize(model, out, kind))
    return Contender(f"llama.cpp {kind}", "llama.cpp", path, {"bits": f"{gguf_models.body_bits(path):.2f} bits"})


ROWS = {"file": file_row, "rotated": rotated_row, "billion": billion_row}


@contextmanager
def processes(contenders: list[Contender], threads: int) -> Iterator[list[Process]]:
    """All of them, loaded."""
    with ExitStack() as stack:
        made = []
        for contender in contenders:
            made.append(Process(contender, threads))
            stack.callback(made[-1].close)
        yield made


def measure(contenders: list[Contender], threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Decode and prefill in turn, with the bandwidth before, between and after."""
    with processes(contenders, threads) as running:
        for process in running:
            process.ask("decode", 8, counted=False)
            process.ask("prefill", PREFILL, counted=False)
        sizes = {"1 GiB": OUT_OF_CACHE, "model": max(running[-1].about["weight_bytes"], 1 << 20)}
        reads = {name: [read_bandwidth(size, threads)] for name, size in sizes.items()}
        for _ in range(options.repeat):
            for process in running:
                process.ask("decode", options.tokens)
                process.ask("prefill", PREFILL)
        for name, size in sizes.items():
            reads[name].append(read_bandwidth(size, threads))
        bandwidth = {name: max(found) for name, found in reads.items()}
        rows = {process.contender.name: process.measured(options.tokens, max(bandwidth.values())) for process in running}
    first = running[0]
    for process in running:
        same = next((place for place, pair in enumerate(zip(process.tokens, first.tokens, strict=True)) if pair[0] != pair[1]), None)
        row, beside = rows[process.contender.name], rows[first.contender.name]
        row["same_tokens_as_first"] = len(first.tokens) if same is None else same
        for kind in ("decode", "prefill"):
            row[f"{kind}_ratio"] = row[f"{kind}_tokens_per_second"] / beside[f"{kind}_tokens_per_second"]
    return {"threads": threads, "bandwidth": bandwidth, "load": os.getloadavg()[0], "engines": rows}


def processor() -> str:
    """What Linux calls it."""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table(measured: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people; ratios are to the first engine."""
    bandwidth = ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in measured["bandwidth"].items())
    yield f"{measured['threads']} thread(s), read bandwidth: {bandwidth}; load {measured['load']:.1f}"
    yield f"{'':24} {'decode/s':>9} {'ratio':>6} {'time':>6} {'MB/token':>9} {'share':>6} {'prefill/s':>10} {'ratio':>6} {'KL':>7}"
    for name, row in measured["engines"].items():
        yield (
            f"{name:24} {row['decode_tokens_per_second']:9.1f} {row['decode_ratio']:6.2f} {1 / row['decode_ratio']:5.2f}x "
            f"{row['bytes_per_token'] / 1e6:9.1f} {row['share_of_bandwidth']:6.0%} {row['prefill_tokens_per_second']:10.1f} "
            f"{row['prefill_ratio']:6.2f} {row.get('kl', float('nan')):7.4f}"
        )


def main() -> None:
    """Print tables, and write `benchmarks/results/DATE-decode-cpu-ROW.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, default="file")
    parser.add_argument("--model", type=Path, help="a llama as .gguf (default: the pinned SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--ours", action="append", help="target and options of qcompile.compile as JSON, in place of the row's own; repeatable"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--eval", type=Path, help="token ids [windows, length] for distances (.npy)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="of the rotation")
    parser.add_argument("--layers", type=int, default=gguf_models.Shape().layers, help="of `billion`")
    parser.add_argument("--types", nargs="+", choices=gguf_models.TYPES, default=list(gguf_models.TYPES), help="llama.cpp's, for `rotated`")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    contenders = ROWS[options.row](options)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    result: dict[str, Any] = {
        "date": today, "command": " ".join(["python -m benchmarks.decode_cpu", *sys.argv[1:]]), "processor": processor(),
        "row": options.row, "prompt": len(PROMPT), "tokens": options.tokens, "prefill": PREFILL, "runs": [],
    }  # fmt: skip
    path = options.out or Path(__file__).parent / "results" / f"{today}-decode-cpu-{options.row}.json"
    for threads in options.threads:
        measured = measure(contenders, threads, options)
        print("\n".join(table(measured)), flush=True)
        result["runs"].append(measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
