"""Decode attention over packed and settled caches on an NVIDIA GPU: times, ratios to 16 bits in the same run, shares of the copy bandwidth.

    python benchmarks/cache_attend_gpu.py
    python benchmarks/cache_attend_gpu.py --context 32768 --batch 1 --formats kv8 "int4 g64 asym"

The ratio is to the fastest of torch's attention over contiguous bfloat16 keys and values (each of its backends that takes the shape), of
flash-attn's decoding where that is installed, and of our own kernel over bfloat16 pages. The floor is the bytes of keys and values over the
bandwidth of a copy. Each time is one call among several in a CUDA graph. What fits into the second-level cache may beat its floor.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_gpu import captured_ms, copy_bandwidth
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.codegen.triton.packed_forms import TABLES, refuses_packed
from qcompile.codegen.triton.settled_form import refuses_form
from qcompile.ir.cache_ops import cache_attend_packed
from qcompile.ir.lowered import KernelSpec
from qcompile.ir.retention_ops import attend_settled
from qcompile.ir.size import evaluate
from qcompile.quant.cache_format import CACHES
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.launch import FrozenLaunch
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.operands import Operand

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
Run = Callable[[], object]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768, 131072], help="tokens of each sequence")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences (default: 1 16)")
    known = ["kv8", "kvfp8", "int4 g64 asym", "kv4", "kv4-token", "kv4-kivi", "kv2-kivi", "kv4-block"]
    parser.add_argument(
        "--formats", nargs="+", default=known, help="caches, or forms that pack every token as it comes (default: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=32, help="query heads (default: %(default)s)")
    parser.add_argument("--key-heads", type=int, default=8, help="key/value heads (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="head size (default: %(default)s)")
    parser.add_argument("--page-tokens", type=int, default=256, help="tokens of a page (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the JSON goes")
    return parser.parse_args(argv)


class Shape:
    """Queries of one token, page tables and positions of `batch` sequences of `context` tokens."""

    def __init__(self, options: argparse.Namespace, batch: int, context: int) -> None:
        """Pages are handed out at random, so that no run of them lies together."""
        self.options, self.batch, self.context = options, batch, context
        self.per_sequence = -(-context // options.page_tokens)
        count = batch * self.per_sequence
        self.table = torch.randperm(count, device="cuda").to(torch.int32).view(batch, -1)
        self.positions = torch.full((batch, 1), context - 1, dtype=torch.int64, device="cuda")
        self.q = torch.randn(batch, options.heads, 1, options.size, dtype=torch.bfloat16, device="cuda")
        self.page_shape = (count, options.key_heads, options.page_tokens)

    @property
    def sizes(self) -> dict[str, int]:
        """What grids and workspaces are made of."""
        pages = {"pages": self.per_sequence, "page_tokens": self.options.page_tokens}
        return {"batch": self.batch, "sequence": 1, "rows": self.batch, **pages}

    def numbers(self) -> Tensor:
        """Vectors of one page of each head, which all pages repeat."""
        return torch.randn(1, *self.page_shape[1:], self.options.size, device="cuda")

    def tables(self, forms: tuple[str, ...]) -> dict[str, Tensor]:
        """Orders of channels at random for forms that have one, by operand."""
        size, heads = self.options.size, self.options.key_heads
        orders = torch.rand(heads, size, device="cuda").argsort(-1).to(torch.uint8)
        return {name: orders for name, form in zip(TABLES, forms, strict=False) if vector_format(form).tables}

    def spec(self, forms: tuple[str, ...], policy: Retention) -> KernelSpec:
        """Decode attention over pages of these forms, none is bfloat16, and over the rows that a policy keeps."""
        stored = "uint8" if forms else "bf16"
        formats = {"keys": stored, "out": "bf16", "page_table": "i32", "positions": "i64", "q": "bf16", "values": stored}
        formats |= dict.fromkeys(self.tables(forms), "uint8")
        options: dict[str, Any] = {"scale": self.options.size**-0.5, "softcap": 0.0, "window": 0}
        options |= dict(zip(("k_form", "v_form"), forms, strict=False))
        sizes = (("D", self.options.size), ("H", self.options.heads), ("L", self.options.key_heads))
        name = "cache_attend_packed" if forms else "cache_attend"
        if policy.rows:
            name = "attend_settled"
            formats |= {"exact_keys": "bf16", "exact_values": "bf16"}
            options |= {"first": policy.first, "recent": policy.recent, "group": policy.group}
        return KernelSpec(name, sizes, tuple(sorted(formats.items())), tuple(sorted(options.items())), "m1")


def launches(spec: KernelSpec, operands: Mapping[str, Tensor], sizes: Mapping[str, int], stream: torch.cuda.Stream) -> Run:
    """The kernel of a specification, built for this GPU and bound to its operands: a call puts it on the stream."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm{major}{minor}"
    (kernel,), binaries = build_kernels([TritonBackend(arch).emit(spec)], arch, cache=kernel_cache())
    driver = Driver()
    driver.make_current()
    modules = Modules(driver, {kernel.name: kernel}, binaries)
    places = {name: Operand.of(tensor) for name, tensor in operands.items()}
    for space in kernel.workspaces:
        places[space.name] = Operand.workspace(torch.empty(evaluate(space.bytes, sizes), dtype=torch.uint8, device="cuda"))
    found = [
        FrozenLaunch(driver, modules.function(kernel, launch), kernel.name, launch, places, sizes, stream.cuda_stream)
        for launch in kernel.launches
    ]
    return lambda: [launch() for launch in found]


def ours(shape: Shape, forms: tuple[str, ...], stream: torch.cuda.Stream, policy: Retention) -> tuple[Run, int, dict[str, Tensor]]:
    """Our kernel over pages of these forms and what a policy keeps, the bytes it reads, and its operands."""
    pages, tables = [], shape.tables(forms)
    for form, name in zip(forms or ("", ""), TABLES, strict=True):
        own = [tables[name]] if name in tables else []
        page = vector_format(form).encode(shape.numbers(), own) if form else shape.numbers().bfloat16()
        pages.append(page.expand(shape.page_shape[0], -1, -1, -1).contiguous())
    out = torch.empty(shape.batch, 1, shape.options.heads, shape.options.size, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    operands = {"q": shape.q, "page_table": shape.table, "positions": shape.positions, "keys": pages[0], "values": pages[1], "out": out}
    operands |= tables
    kept = shape.context
    if policy.rows:
        kept = policy.page_slot(policy.settled(shape.context))
        exact = (shape.batch, shape.options.key_heads, policy.rows + 1, shape.options.size)
        operands |= {name: torch.randn(exact, dtype=torch.bfloat16, device="cuda") for name in ("exact_keys", "exact_values")}
    torch.cuda.synchronize()
    heads = shape.batch * shape.options.key_heads
    read = sum(heads * kept * page.shape[3] * page.element_size() for page in pages)
    read += 2 * heads * (shape.context - kept) * shape.options.size * shape.q.element_size()
    return launches(shape.spec(forms, policy), operands, shape.sizes, stream), read, operands


def peers(shape: Shape) -> dict[str, Run]:
    """Attention of others over contiguous bfloat16 keys and values; building one is no promise that it takes the shape."""
    options = shape.options
    k, v = (torch.randn(shape.batch, options.key_heads, shape.context, options.size, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def sdpa(backend: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(shape.q, k, v, enable_gqa=True)

        return run

    found = {f"sdpa-{name}": sdpa(backend) for name, backend in BACKENDS.items()}
    try:
        flash = importlib.import_module("flash_attn").flash_attn_with_kvcache
    except (ImportError, AttributeError):
        return found
    laid = [part.transpose(1, 2).contiguous() for part in (k, v)]
    return {**found, "flash-attn": lambda: flash(shape.q.transpose(1, 2), *laid)}


def time_peers(shape: Shape, stream: torch.cuda.Stream) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each peer that takes the shape, and why the others do not."""
    times, missing = {}, {}
    for name, run in peers(shape).items():
        try:
            times[name] = captured_ms(run, stream)
        except RuntimeError as error:
            missing[name] = str(error).splitlines()[0]
    run, _, _ = ours(shape, (), stream, Retention())
    times["qcompile-bf16"] = captured_ms(run, stream)
    return times, missing


def error_of(operands: Mapping[str, Tensor], forms: tuple[str, ...], policy: Retention, run: Run) -> float:
    """The greatest difference from the reference operator on the same bytes, relative to its largest number."""
    run()
    torch.cuda.synchronize()
    exact = ("exact_keys", "exact_values") if policy.rows else ()
    tensors = [operands[name] for name in ("q", "keys", "values", *exact, "page_table", "positions")]
    k_tables, v_tables = ([operands[name]] if name in operands else None for name in TABLES)
    scale = operands["q"].shape[-1] ** -0.5
    if policy.rows:
        options = (policy.first, policy.recent, policy.group, scale)
        expected = attend_settled(*tensors, *forms, *options, k_tables=k_tables, v_tables=v_tables).float()
    else:
        expected = cache_attend_packed(*tensors, *forms, scale, k_tables=k_tables, v_tables=v_tables).float()
    return float((operands["out"].float() - expected).abs().max() / expected.abs().max())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each context, batch and format."""
    stream, bandwidth, rows = torch.cuda.Stream(), copy_bandwidth(), []
    for context in options.context:
        for batch in options.batch:
            shape = Shape(options, batch, context)
            times, missing = time_peers(shape, stream)
            fastest = min(times, key=lambda name: times[name])
            for name in options.formats:
                forms, policy = forms_of(name), policy_of(name)
                run, read, operands = ours(shape, forms, stream, policy)
                milliseconds = captured_ms(run, stream)
                # The reference unpacks everything into float32: only where that is small.
                error = error_of(operands, forms, policy, run) if batch * context <= 1 << 16 else None
                found: dict[str, Any] = {
                    "format": name, "context": context, "batch": batch, "ms": milliseconds, "bf16": fastest, "bf16_ms": times[fastest],
                    "ratio": times[fastest] / milliseconds, "floor_share": read / bandwidth * 1e3 / milliseconds, "error": error,
                    "copy_bytes_per_second": bandwidth, "peers_ms": times, "missing": missing,
                }  # fmt: skip
                rows.append(found)
                print(line(rows[-1]), flush=True)
                del run, operands
            del shape
            torch.cuda.empty_cache()
    return rows


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    error = "" if row["error"] is None else f", within {row['error']:.1e} of the reference"
    return (
        f"{row['format']:>13} context {row['context']:>7} batch {row['batch']:>3}: {row['ms'] * 1e3:9.1f} us, "
        f"{row['ratio']:5.2f}x {row['bf16']} ({row['bf16_ms'] * 1e3:.1f} us), {row['floor_share']:6.1%} of the copy bandwidth{error}"
    )


def forms_of(name: str) -> tuple[str, ...]:
    """The forms of keys and values of a cache, or a form for both."""
    return CACHES[name].forms() if name in CACHES else (name, name)


def policy_of(name: str) -> Retention:
    """Which tokens a cache keeps in bfloat16; a form keeps none."""
    return CACHES[name].retention if name in CACHES else Retention()


def unserved(options: argparse.Namespace) -> str:
    """Why a format asked for cannot be measured here, or an empty string."""
    for name in options.formats:
        policy = policy_of(name)
        refuses = partial(refuses_form, name) if policy.rows else refuses_packed
        reason = next((reason for form in forms_of(name) if (reason := refuses(form, options.size))), None)
        if reason is None and options.page_tokens % policy.group:
            reason = f"expected a multiple of {policy.group} for --page-tokens, got {options.page_tokens}"
        if reason or not forms_of(name):
            return f"format {name}: {reason or 'expected one that is packed, such as kv8, kv4-kivi or int4 g64 asym'}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = arguments(argv)
    reason = unserved(options)
    if reason or not torch.cuda.is_available():
        print(f"cache_attend_gpu: {reason or 'expected an NVIDIA GPU that torch can use, got none; run it on a GPU machine'}")
        return 2
    rows = measure(options)
    options.results.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name()
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    name = f"{date}-cache-attend-{gpu.lower().replace(' ', '-')}.json"
    (options.results / name).write_text(json.dumps({"date": date, "gpu": gpu, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
