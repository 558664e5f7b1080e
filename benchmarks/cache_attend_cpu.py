"""Attention over caches by the C++ kernels on a CPU: times, ratios to 16 bits in the same run, bytes per second, errors, torch beside it.

    python -m benchmarks.cache_attend_cpu [--context 4096 16384] [--threads 1 2] [--prefill 256 2048] [--fast] [--out FILE.json]

Decoding: queries of one token over `context` tokens, pages in any order. `hot` repeats one layer, whose pages stay in the processor's
cache where they fit; `cold` goes through as many layers as take `--cold` bytes, as a model does. A time is the least of single calls. The
ratio is kv16's time, of this backend and the same row, over the format's. Bytes are those that a call must read: codes, scales, and what is
kept as it came. Errors are the greatest difference from the reference operator on the same cache in float64, relative to the largest value;
beside it that of the reference operator in float32; then that of both from attention over the numbers before they were stored. With
`--fast` packed formats are measured with fast products too, as `matmul="fast"` has them. Prefill: a prompt at once, in GFLOP/s of its two
products.
torch is `scaled_dot_product_attention` over contiguous float32 or float16 keys and values, repeated for the heads of queries by itself.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.codegen.build_cache import kernel_cache
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.ir.cache_ops import cache_attend_packed
from qcompile.ir.lowered import Kernel, KernelSpec
from qcompile.ir.native import INSTRUCTION_SETS
from qcompile.ir.ops import cache_attend
from qcompile.ir.retention_ops import attend_settled
from qcompile.quant.cache_format import CACHES
from qcompile.quant.vector_format import vector_format
from qcompile.runtime.huge_pages import huge_zeros
from qcompile.runtime.native.library import Entry, Library
from qcompile.runtime.native.processor import features
from qcompile.runtime.native.program import table_of

SHAPES = {64: (9, 3), 128: (32, 8)}
"""Head size -> heads of queries and of keys: SmolLM2-135M's and an 8B model's."""
KNOWN = ["kv16", "kv8", "kv4", "kv4-token", "kv4-kivi", "kv2-kivi"]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="*", default=[4096, 16384], help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--prefill", type=int, nargs="*", default=[256, 2048], help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES), help="head sizes (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: %(default)s)")
    parser.add_argument("--formats", nargs="+", default=KNOWN, choices=list(CACHES), metavar="CACHE", help="(default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="packed formats with fast products too")
    parser.add_argument("--page-tokens", type=int, default=128, help="tokens of a page (default: %(default)s)")
    parser.add_argument("--cold", type=int, default=128 << 20, help="bytes that `cold` goes through (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="spent on each time (default: %(default)s)")
    parser.add_argument("--instruction-set", choices=list(INSTRUCTION_SETS), default=None, help="(default: this processor's best)")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the rows")
    return parser.parse_args(argv)


class Case:
    """One attention over caches of a format: `new` queries behind `context - new` tokens, as many caches as `layers`."""

    def __init__(self, name: str, size: int, context: int, new: int, page_tokens: int, *, fast: bool = False) -> None:
        """The specification; `fill` makes the tensors."""
        self.size, self.context, self.new, self.page_tokens, self.fast = size, context, new, page_tokens, fast
        self.heads, self.key_heads = SHAPES[size]
        self.policy = CACHES[name].retention
        self.forms = CACHES[name].forms()
        self.name = f"{name} fast" if fast else name

    @property
    def spec(self) -> KernelSpec:
        """Of the kernel."""
        stored = "uint8" if self.forms else "fp16"
        formats = {"q": "fp32", "keys": stored, "values": stored, "page_table": "i32", "positions": "i64", "out": "fp32"}
        options: dict[str, Any] = {"scale": self.size**-0.5, "window": 0, "softcap": 0.0}
        options |= dict(zip(("k_form", "v_form"), self.forms, strict=False)) | ({"products": "fast"} if self.fast else {})
        operator = "cache_attend_packed" if self.forms else "cache_attend"
        if self.policy.rows:
            operator = "attend_settled"
            formats |= {"exact_keys": "fp16", "exact_values": "fp16"}
            options |= vars(self.policy)
        sizes = {"D": self.size, "H": self.heads, "L": self.key_heads}
        return KernelSpec(operator, tuple(sorted(sizes.items())), tuple(sorted(formats.items())), tuple(sorted(options.items())), "m1")

    @property
    def settled(self) -> int:
        """Tokens that a decoded one reads from pages."""
        return self.policy.page_slot(self.policy.settled(self.context)) if self.policy.rows else self.context

    @property
    def read(self) -> int:
        """Bytes of keys and values that queries of one token must read."""
        widths = [vector_format(form).width(self.size) for form in self.forms] or [2 * self.size] * 2
        return self.key_heads * (self.settled * sum(widths) + (self.context - self.settled) * 4 * self.size)

    def fill(self) -> dict[str, Tensor]:
        """The operands, and the random `numbers` [2, L, T, D] they store; pages in an order of their own, in memory as `KVCache` has it."""
        numbers, pages = torch.randn(2, self.key_heads, self.context, self.size), -(-self.context // self.page_tokens)
        slots = functional.pad(numbers[:, :, self.policy.first :], (0, 0, 0, pages * self.page_tokens - self.context + self.policy.first))
        parts = slots.unflatten(2, (pages, self.page_tokens)).transpose(1, 2)
        stored = [vector_format(form).encode(part) for form, part in zip(self.forms, parts, strict=True)] if self.forms else None
        caches = stored or [part.half() for part in parts]
        memory, order = huge_zeros((cache.shape, cache.dtype) for cache in caches), torch.randperm(pages)
        operands = {name: part.index_copy_(0, order, cache) for name, part, cache in zip(("keys", "values"), memory, caches, strict=True)}
        operands |= {"numbers": numbers, "page_table": order.to(torch.int32).unsqueeze(0)}
        operands["positions"] = torch.arange(self.context - self.new, self.context).unsqueeze(0)
        operands["q"] = torch.randn(1, self.new, self.heads, self.size).transpose(1, 2)
        operands["out"] = torch.empty(1, self.new, self.heads, self.size).transpose(1, 2)
        if self.policy.rows:
            before = self.context - self.new
            kept = [position for position in self.policy.held(before) if position < before]
            exact = torch.zeros(2, 1, self.key_heads, self.policy.rows + self.new, self.size, dtype=torch.float16)
            exact[:, 0, :, [self.policy.row(position) for position in kept]] = numbers[:, :, kept].half()
            exact[:, 0, :, self.policy.rows :] = numbers[:, :, before:].half()
            operands |= dict(zip(("exact_keys", "exact_values"), exact, strict=True))
        return operands

    def reference(self, operands: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The operator's definition on the operands, computed in `dtype`."""
        exact = ("exact_keys", "exact_values") if self.policy.rows else ()
        tensors = [operands[name] for name in ("keys", "values", *exact, "page_table", "positions")]
        q = operands["q"].to(dtype)
        if self.policy.rows:
            return attend_settled(q, *tensors, *self.forms, *vars(self.policy).values(), self.size**-0.5)
        return cache_attend_packed(q, *tensors, *self.forms, self.size**-0.5) if self.forms else cache_attend(q, *tensors, self.size**-0.5)

    def unrounded(self, operands: Mapping[str, Tensor]) -> Tensor:
        """Attention over the numbers before any was stored, computed in float64."""
        pages = operands["numbers"].double().unsqueeze(1)
        return cache_attend(operands["q"].double(), *pages, torch.zeros(1, 1, dtype=torch.int32), operands["positions"], self.size**-0.5)


class Kernels:
    """The kernels of all cases in one library."""

    def __init__(self, cases: Sequence[Case], instruction_set: str) -> None:
        """Built once, as users get them."""
        self.kernels: dict[KernelSpec, Kernel] = {case.spec: CppBackend().emit(case.spec) for case in cases}
        source = kernels_source(
            {kernel.name: kernel for kernel in self.kernels.values()}.values(), "Attention over caches, to be measured."
        )
        ((name, code),) = build_libraries(source, [instruction_set], kept_in=kernel_cache()).items()
        self.library = Library(name, code)

    def bound(self, case: Case, operands: Mapping[str, Tensor]) -> tuple[Entry, Tensor]:
        """The function and the table of its tensors, which the operands outlive."""
        kernel = self.kernels[case.spec]
        tensors = [operands[str(parameter.value)] for parameter in kernel.launches[0].parameters]
        return self.library.entry(f"qcompile_{kernel.name}"), table_of(tensors)


def least(calls: Iterator[Callable[[], object]], seconds: float) -> float:
    """Seconds of the fastest call."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        call = next(calls)
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(seconds: float) -> float:
    """Bytes per second of the fastest sum over memory that no cache holds, with torch's threads."""
    numbers = torch.ones(1 << 26)
    return numbers.nbytes / least(itertools.repeat(numbers.sum), seconds)


def measure(case: Case, kernels: Kernels, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by threads, hot and cold, and errors."""
    first = case.fill()
    copies = 0 if case.new > 1 else -(-options.cold // case.read)
    layers = [first, *({name: tensor.clone() for name, tensor in first.items()} for _ in range(copies))]
    bound = [kernels.bound(case, layer) for layer in layers]
    found: dict[str, Any] = {"format": case.name, "size": case.size, "context": case.context, "new": case.new, "read": case.read}
    for threads in options.threads:
        calls = [partial(function, table.data_ptr(), threads) for function, table in bound]
        found[f"hot {threads}"] = least(itertools.repeat(calls[0]), options.seconds)
        if case.new == 1:
            found[f"cold {threads}"] = least(itertools.cycle(calls), options.seconds)
    if case.heads < 16 or case.new == 1:
        exact = case.reference(layers[0], torch.float64)
        largest = float(exact.abs().max())
        found["error"] = float((layers[0]["out"] - exact).abs().max()) / largest
        found["reference_error"] = float((case.reference(layers[0], torch.float32) - exact).abs().max()) / largest
    if case.new == 1:
        unrounded = case.unrounded(layers[0])
        for name, result in (("value_error", layers[0]["out"]), ("reference_value_error", exact)):
            found[name] = float((result - unrounded).abs().max() / unrounded.abs().max())
    return found


def measure_torch(size: int, context: int, new: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same for torch's own attention over float32 and float16 caches."""
    heads, key_heads = SHAPES[size]
    rows = []
    for dtype in (torch.float32, torch.float16):
        count = 1 if new > 1 else max(1, -(-options.cold // (2 * key_heads * context * size * dtype.itemsize)))
        layers = [[torch.randn(1, key_heads, context, size, dtype=dtype) for _ in range(2)] for _ in range(count)]
        q = torch.randn(1, heads, new, size, dtype=dtype)
        found: dict[str, Any] = {"format": f"torch {str(dtype).removeprefix('torch.')}", "size": size, "context": context, "new": new}
        calls = [partial(functional.scaled_dot_product_attention, q, k, v, is_causal=new > 1, enable_gqa=True) for k, v in layers]
        for threads in options.threads:
            torch.set_num_threads(threads)
            found[f"hot {threads}"] = least(itertools.repeat(calls[0]), options.seconds)
            if new == 1:
                found[f"cold {threads}"] = least(itertools.cycle(calls), options.seconds)
        rows.append(found)
    return rows


def line(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    times = []
    for key in (key for key in row if key.split()[0] in ("hot", "cold")):
        flops = 2 * 2 * row["size"] * SHAPES[row["size"]][0] * row["new"] * (row["new"] + 1) / 2
        speed = f"{flops / row[key] / 1e9:.0f} GFLOP/s" if row["new"] > 1 else f"{row.get('read', 0) / row[key] / 1e9:.1f} GB/s"
        times.append(f"{key}t {row[key] * 1e6:7.0f} us {base[key] / row[key]:5.2f}x {speed if 'read' in row or row['new'] > 1 else ''}")
    error = f"; error {row['error']:.1e}, the reference's {row['reference_error']:.1e}" if "error" in row else ""
    if "value_error" in row:
        error += f"; from the numbers as they came {row['value_error']:.4f}, the reference's {row['reference_value_error']:.4f}"
    return f"D={row['size']} {row['context']:>6} {row['format']:>13}: {', '.join(times)}{error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = arguments(argv)
    best = next(name for name, wanted in INSTRUCTION_SETS.items() if wanted <= features())
    formats = list(dict.fromkeys(["kv16", *options.formats]))
    works = [(size, context, 1) for size in options.size for context in options.context]
    works += [(size, tokens, tokens) for size in options.size for tokens in options.prefill]
    kinds = [(name, fast) for name in formats for fast in (False, True) if not fast or (options.fast and CACHES[name].forms())]
    cases = {work: [Case(name, *work, options.page_tokens, fast=fast) for name, fast in kinds] for work in works}
    refused = [(case.name, reason) for many in cases.values() for case in many if (reason := CppBackend().refuses(case.spec))]
    if refused:
        print(f"cache_attend_cpu: {refused[0][0]}: {refused[0][1]}; choose others with --formats")
        return 2
    kernels = Kernels([case for many in cases.values() for case in many], options.instruction_set or best)
    bandwidth = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        bandwidth[threads] = read_bandwidth(options.seconds)
        print(f"reading with {threads} threads: {bandwidth[threads] / 1e9:.1f} GB/s")
    rows = []
    for work, many in cases.items():
        measured = [measure(case, kernels, options) for case in many]
        measured += measure_torch(*work, options)
        for row in measured:
            print(line(row, measured[0]), flush=True)
        rows += measured
    if options.out:
        result = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(), "processor": platform.processor() or platform.machine(),
            "instruction_set": options.instruction_set or best, "torch": torch.__version__, "read_bandwidth": bandwidth,
            "command": " ".join(["python -m benchmarks.cache_attend_cpu", *sys.argv[1:]]), "rows": rows,
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
