"""Decode on an NVIDIA GPU: tokens equal to the reference's, tokens per second, the share of the copy bandwidth, ratios to peers.

    python benchmarks/decode_gpu.py ARTIFACT            # a folder compiled for this GPU, such as sm90-int4
    python benchmarks/decode_gpu.py MODEL --compile     # compile it here first

Times are medians of device events after a warm-up; peers run in the same process on the same matrices.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS

from qcompile.ir.lowered import Plan
from qcompile.runtime.cuda.program import Action, Program
from qcompile.runtime.engines.cuda import CudaEngine

REPEATS = 50
COPY_BYTES = 1 << 30
"""Twenty times the largest second-level cache: what is copied comes from memory."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="folder of a compiled model, or a model with --compile")
    parser.add_argument("--compile", action="store_true", help="compile the model for --target into memory first")
    parser.add_argument("--target", default="sm90-int4", help="target of --compile (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens compared and timed (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes to time (default: 1 8)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[504, 3575, 282, 4649, 314], help="token ids of the prompt")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the JSON goes")
    return parser.parse_args(argv)


def open_contents(options: argparse.Namespace) -> Any:
    """The artifact's contents: plan, kernels, trusted binaries, graph."""
    import qcompile

    most = max(options.batch)
    if options.compile:
        return qcompile.compile(options.artifact, options.target, max_batch=most).contents
    return qcompile.load(options.artifact, allow_native=True, max_batch=most).contents


def engine_for(contents: Any, plan: Plan, options: argparse.Namespace) -> CudaEngine:
    """The CUDA engine over a plan for the artifact's constants."""
    own = copy.copy(contents)
    own.plan = plan
    return CudaEngine(own, max_batch=max(options.batch), max_context=1024)


def reference_plan(plan: Plan) -> Plan:
    """The same plan without kernels: every step runs as its torch reference on the same GPU."""
    entries = {name: replace(entry, steps=tuple(replace(step, kernels={}) for step in entry.steps)) for name, entry in plan.entries.items()}
    return replace(plan, entries=entries, kernels=())


def compare(engine: CudaEngine, reference: CudaEngine, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Greedy tokens of both along the reference's tokens, and the greatest difference of logits relative to the largest."""
    ours, theirs = engine.prefill([prompt]), reference.prefill([prompt])
    equal, worst, first = 0, 0.0, None
    for index in range(count):
        error = float((ours - theirs).float().abs().max() / theirs.float().abs().max())
        worst = max(worst, error)
        token = theirs.argmax(-1)
        if bool((ours.argmax(-1) == token).all()):
            equal += 1
        elif first is None:
            margin = theirs.float().topk(2, dim=-1).values[0]
            first = {"index": index, "reference_margin": float(margin[0] - margin[1])}
        ours, theirs = engine.decode(token), reference.decode(token)
    return {"tokens": count, "equal": equal, "first_difference": first, "max_relative_error": worst}


def device_ms(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median milliseconds of the device over `repeats` runs, after a tenth as many to warm up."""
    times = []
    for index in range(repeats + max(3, repeats // 10)):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= max(3, repeats // 10):
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a device-to-device copy moves, read and write counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (device_ms(lambda: target.copy_(source)) / 1e3)


def weight_bytes(contents: Any) -> int:
    """Bytes of the constants that one decode step reads, as the artifact stores them: all but the tables of which it takes a row."""
    entry = contents.plan.entries["decode"]
    read: set[str] = set()
    for step in entry.steps:
        if "embedding" not in step.operator:
            read |= {item["buffer"] for item in step.args if isinstance(item, dict) and "buffer" in item}
    return sum(contents.constants[name].nbytes for name in read if entry.buffers[name].kind == "constant")


def decode_speed(engine: CudaEngine, prompt: Sequence[int], batch: int, count: int) -> dict[str, float]:
    """Tokens per second of the whole loop with greedy choice, and milliseconds of the device for one replay."""
    logits = engine.prefill([prompt] * batch)
    for _ in range(3):
        logits = engine.decode(logits.argmax(-1))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        logits = engine.decode(logits.argmax(-1))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    replay = device_ms(lambda: engine.replay(batch))
    return {
        "batch": batch,
        "tokens_per_second": batch * count / seconds,
        "device_ms": replay,
        "device_tokens_per_second": batch / replay * 1e3,
    }


def captured_ms(run: Callable[[], object], stream: torch.cuda.Stream, calls: int = 20) -> float:
    """Milliseconds of one call among `calls` in one CUDA graph: launch costs of the host do not count."""
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            run()
    return device_ms(graph.replay) / calls


def quantized_linears(program: Program) -> dict[tuple[int, int, int], list[Action]]:
    """(N, K, group size) of the 4-bit linears of a decode step -> what the first of each shape puts on the stream."""
    found: dict[tuple[int, int, int], list[Action]] = {}
    for step in program.entry.steps:
        if step.operator == "qcompile.quantized_linear.default" and step.args[5] == 4:
            shape = (program.tensor(step.outputs[0]).shape[-1], program.tensor(step.args[0]["buffer"]).shape[-1], step.args[6])
            found.setdefault(shape, program.actions[slice(*program.spans[step.node])])
    return found


def compare_peers(engine: CudaEngine) -> list[dict[str, Any]]:
    """Per shape of a 4-bit linear of one token: microseconds of ours and of each peer, and how many times as fast ours is."""
    rows = []
    stream = engine.queue.torch_stream
    assert stream is not None
    for (rows_out, columns, group), actions in quantized_linears(engine.program(1)).items():
        ours = captured_ms(lambda actions=actions: [action() for action in actions], stream)  # type: ignore[misc]
        row: dict[str, Any] = {
            "N": rows_out,
            "K": columns,
            "group_size": group,
            "microseconds": {"qcompile": ours * 1e3},
            "ratio": {},
            "missing": {},
        }
        for name, build in PEERS.items():
            try:
                theirs = captured_ms(build(rows_out, columns, group), stream)
            except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
                row["missing"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            row["microseconds"][name] = theirs * 1e3
            row["ratio"][name] = theirs / ours
        rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON value."""
    contents = open_contents(options)
    engine = engine_for(contents, contents.plan, options)
    reference = engine_for(contents, reference_plan(contents.plan), options)
    bandwidth = copy_bandwidth()
    tokens = compare(engine, reference, options.prompt, options.tokens)
    reference.close()
    speeds = [decode_speed(engine, options.prompt, batch, options.tokens) for batch in options.batch]
    stored = weight_bytes(contents)
    reached = stored / (engine_ms(speeds) / 1e3)
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "target": str(contents.target), "captured_buckets": engine.captured_buckets, "equal_to_reference": tokens, "decode": speeds,
        "weight_bytes_per_token": stored, "copy_bytes_per_second": bandwidth, "share_of_copy_bandwidth": reached / bandwidth,
        "linears": compare_peers(engine),
    }  # fmt: skip


def engine_ms(speeds: Sequence[dict[str, float]]) -> float:
    """Device milliseconds of the smallest batch."""
    return min(speeds, key=lambda row: row["batch"])["device_ms"]


def table(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    tokens = result["equal_to_reference"]
    lines = [
        f"{result['gpu']}, {result['target']}: {tokens['equal']} of {tokens['tokens']} tokens equal to the reference's, "
        f"logits within {tokens['max_relative_error']:.1e}",
        f"copy {result['copy_bytes_per_second'] / 1e12:.2f} TB/s, weights {result['weight_bytes_per_token'] / 1e6:.1f} MB a token, "
        f"share of the copy bandwidth {result['share_of_copy_bandwidth']:.1%}",
    ]
    lines += [
        f"batch {row['batch']}: {row['tokens_per_second']:.0f} tokens/s, device {row['device_ms']:.3f} ms" for row in result["decode"]
    ]
    for row in result["linears"]:
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratio"].items()) or "no peer"
        lines.append(f"N={row['N']} K={row['K']} g{row['group_size']}: {row['microseconds']['qcompile']:.1f} µs, {ratios}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = arguments(argv)
    if not torch.cuda.is_available():
        print("decode_gpu: expected an NVIDIA GPU that torch can use, got none; run it on a GPU machine")
        return 2
    result = measure(options)
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"{result['date']}-{result['gpu'].lower().replace(' ', '-')}.json"
    (options.results / name).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0 if result["equal_to_reference"]["equal"] == result["equal_to_reference"]["tokens"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
