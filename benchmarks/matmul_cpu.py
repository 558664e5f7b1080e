"""int4 products on the CPU beside onnxruntime's `MatMulNBits` (accuracy level 4) and torch's packed int4: one process, rounds in turn.

    python -m benchmarks.matmul_cpu [--threads 1 2] [--rows 1 64] [--rounds 15] [--quick] [--out FILE.json]

Weights [N, K] of 576 -> 1536 and 4096 -> 4096 in groups of 32 and 64, symmetric and with zero points. Hot: the same weight again and
again. Cold: copies of it in turn, more than four times the last cache; GB/s are over the bytes of codes, scales and zero points as each
engine's format needs them at least (4 bits, and 16 bits of scale per group), beside the read bandwidth of a C++ loop in the same rounds.

Ours in both modes, called as a program's run of steps is: once for all copies, one step behind the other. `fast` quantizes the float32
x per group to int8 (in the timed call) and sums products of integers; `exact` keeps 24 bits of it. onnxruntime quantizes x too; torch
computes in bf16 or float32, whichever of the two is faster here. `call` is what a call of the peer's interface costs with nothing in it,
`net` the ratio without it.
Before anything is timed each product is compared with float64, within a bound that follows from the activations' codes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.matmul_peers import Case, Run, onnxruntime_product, torch_product
from benchmarks.read_bandwidth import cache_bytes, large_pages, read_loop
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.build import build_libraries, instruction_sets
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Kernel, KernelSpec
from qcompile.quant.format import parse_format
from qcompile.quant.reference import Quantized, quantize, restore
from qcompile.runtime.huge_pages import huge_zeros
from qcompile.runtime.native.library import Library
from qcompile.runtime.native.program import table_of

SHAPES = ((576, 1536), (4096, 4096))
FORMATS = ("int4 g32 sym fp16", "int4 g64 sym fp16", "int4 g32 asym fp16", "int4 g64 asym fp16")
LEAST_SECONDS = 0.004
"""Of a timed batch of calls."""
WARM_SECONDS = 0.002
"""Before it."""
COLD_CACHES = 4.2
"""Copies of a weight, in sizes of the last cache."""


def spec(operator: str, sizes: dict[str, int], formats: dict[str, str], bucket: str = "", **options: Any) -> KernelSpec:
    """A specification as lowering makes it."""
    return KernelSpec(operator, tuple(sorted(sizes.items())), tuple(sorted(formats.items())), tuple(sorted(options.items())), bucket)


@dataclass(frozen=True)
class Product:
    """The kernels of one shape and format for one number of rows."""

    columns: int
    rows: int
    form: str
    count: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return parse_format(self.form).granularity.group_size

    @property
    def _zero(self) -> bool:
        return "asym" in self.form

    @property
    def bucket(self) -> str:
        """Of x."""
        return "m1" if self.count == 1 else "m2-63" if self.count < 64 else "m64"

    def quantized(self) -> KernelSpec:
        """Codes and scales of x."""
        formats = {"x": "fp32", "out": "i8", "out1": "fp16"}
        return spec("quantize_activation", {"K": self.columns}, formats, bits=8, group_size=self.group, clip=1.0)

    def fast(self) -> KernelSpec:
        """The product of codes."""
        formats = {"codes": "i8", "scale": "fp16", "w_codes": self.form, "w_scale": "fp16", "out": "fp32"}
        formats |= {"w_zero": "uint8"} if self._zero else {}
        return spec("integer_linear", {"N": self.rows, "K": self.columns}, formats, self.bucket, group_size=self.group)

    def exact(self) -> KernelSpec:
        """The product with floats."""
        formats = {"x": "fp32", "codes": self.form, "scale": "fp16", "out": "fp32"} | ({"zero": "uint8"} if self._zero else {})
        return spec("quantized_linear", {"N": self.rows, "K": self.columns}, formats, self.bucket)


class Ours:
    """One library with the kernels of every product."""

    def __init__(self, products: list[Product]) -> None:
        """Build it with the best instruction set of this machine."""
        specs = dict.fromkeys(made for one in products for made in (one.quantized(), one.fast(), one.exact()))
        self._kernels: dict[KernelSpec, Kernel] = {one: CppBackend().emit(one) for one in specs}
        distinct = {kernel.name: kernel for kernel in self._kernels.values()}
        source = kernels_source(distinct.values(), "Products of 4-bit weights.")
        runs = {_run_of(self._kernels[one.fast()], self._kernels[one.quantized()]) for one in products}
        source += "".join(sorted(runs | {_run_of(self._kernels[one.exact()]) for one in products}))
        ((name, code),) = build_libraries(source, instruction_sets()[:1]).items()
        self._library, self.name = Library(name, code), name

    def fast(self, product: Product, case: Case) -> Run:
        """Codes of x and their product, in one call."""
        kernel = self._kernels[product.fast()]
        groups = product.columns // product.group
        codes, scale = (
            torch.empty(product.count, product.columns, dtype=torch.int8),
            torch.empty(product.count, groups, dtype=torch.float16),
        )
        return self._run(kernel, [case.x, codes, scale], {"codes": codes, "scale": scale}, case)

    def exact(self, product: Product, case: Case) -> Run:
        """The product with floats."""
        kernel = self._kernels[product.exact()]
        return self._run(kernel, [], {"x": case.x}, case)

    def _run(self, kernel: Kernel, before: list[Tensor], operands: dict[str, Tensor], case: Case) -> Run:
        out = torch.empty(case.x.shape[0], case.weight.codes.shape[0])
        layouts, table, held = dict(kernel.layouts), [torch.empty(case.copies), *before], []
        stored = {place if place in layouts else f"w_{place}": part for place, part in _stored(case.weight).items()}
        packed = {place: apply_layout(layouts[place], part) for place, part in stored.items()}
        memory = iter(huge_zeros((part.shape, part.dtype) for _ in range(case.copies) for part in packed.values()))  # as constants lie
        for _ in range(case.copies):
            held.append({**operands, "out": out, **{place: next(memory).copy_(part) for place, part in packed.items()}})
            table += [held[-1][str(parameter.value)] for parameter in kernel.launches[0].parameters]
        function, places = self._library.entry(f"run_{kernel.name}"), table_of(table)

        def call(held: object = held) -> None:
            del held
            function(places.data_ptr(), case.threads)

        return Run(call, lambda: None, lambda: out)


def _stored(weight: Quantized) -> dict[str, Tensor]:
    parts = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def _run_of(kernel: Kernel, before: Kernel | None = None) -> str:
    """One function that multiplies x with each copy of a weight, behind what makes the codes of x: t[0] has as many elements as copies."""
    count, first = len(kernel.launches[0].parameters), 4 if before else 1
    given = ["t[2]", "t[3]"] * bool(before) + [f"own[{place}]" for place in range(2 * bool(before), count)]
    coded = f"        {before.name}(team, t[1], t[2], t[3]);\n        team.wait();\n" if before else ""
    return (
        f"\nstatic void steps_{kernel.name}(const Team& team, const Tensor* t) {{\n"
        f"    for (int64_t copy = 0; copy < t[0].count(); copy++) {{\n        const Tensor* own = t + {first} + copy * {count};\n"
        f"{coded}        {kernel.name}({', '.join(['team', *given])});\n        team.wait();\n    }}\n}}\n"
        f'\nextern "C" void run_{kernel.name}(const Tensor* tensors, int64_t threads) {{ run(threads, steps_{kernel.name}, tensors); }}\n'
    )


def checked(case: Case, runs: dict[str, Run]) -> dict[str, float]:
    """The greatest error of each product as a share of its bound.

    Codes of 8 bits per group are off by at most half a step of 1/127 of the group's extreme, scales of 16 bits by 2^-11 of it more; torch
    rounds x, weights and results to bf16 (2^-9 each); sums of floats round like 2^-24 for each column.
    """
    form = parse_format(f"int4 g{case.group} {'sym' if case.weight.zero is None else 'asym'} fp16")
    weight, x = restore(case.weight, form, case.x.shape[1], torch.float64), case.x.double()
    exact = x @ weight.t()
    sizes = x.abs() @ weight.abs().t()
    extreme = x.view(len(x), -1, case.group).abs().amax(-1).repeat_interleave(case.group, dim=1)
    coded = (0.5 / 127 + 2.0**-11) * (extreme @ weight.abs().t()) + 2.0**-16 * sizes
    bounds = {"ours fast": coded, "onnxruntime": coded, "ours exact": 2.0**-16 * sizes, "torch": 2.0**-7 * sizes}
    found = {}
    for name, run in runs.items():
        run.call()
        found[name] = float(((run.out().double() - exact).abs() / bounds[name]).max())
        if not found[name] <= 1:
            sys.exit(f"benchmarks/matmul_cpu.py: {name}: expected the product within its bound, got {found[name]:.2f} times it")
    return found


def _seconds(call: Callable[[], object], count: int, warm: float = 0.0) -> float:
    """Of each of `count` calls, after others for `warm` seconds: threads of another engine may still wait busily for its next call."""
    started = time.perf_counter()
    while time.perf_counter() - started < warm:
        call()
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _batch(call: Callable[[], object]) -> int:
    call()
    return max(1, int(LEAST_SECONDS / max(_seconds(call, 2), 1e-7)))


def faster(case: Case) -> tuple[str, Run]:
    """The product of torch with the faster of its two activations."""
    runs = {name: torch_product(Case(case.x, case.weight, 1, case.threads), dtype) for name, dtype in _TORCH.items()}
    speed = {name: min(_seconds(run.call, 1) for _ in range(3)) for name, run in runs.items()}
    name = min(speed, key=lambda key: speed[key])
    return name, torch_product(case, _TORCH[name])


_TORCH = {"bf16": torch.bfloat16, "float32": torch.float32}


def measure(ours: Ours, product: Product, cold: bool, threads: int, rounds: int, read: Callable[[Tensor, int], float]) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    weight = quantize(torch.randn(product.rows, product.columns), parse_format(product.form))
    size = sum(part.nbytes for part in _stored(weight).values())
    copies = int(COLD_CACHES * cache_bytes() / size) + 1 if cold else 1
    case = Case(torch.randn(product.count, product.columns), weight, copies, threads)
    runs = {"ours fast": ours.fast(product, case), "ours exact": ours.exact(product, case), "onnxruntime": onnxruntime_product(case)}
    dtype, runs["torch"] = faster(case)
    errors = checked(case, runs)
    counts = {name: _batch(run.call) for name, run in runs.items()}
    empty = {name: min(_seconds(run.empty, 200) for _ in range(3)) / copies for name, run in runs.items()}
    memory = large_pages(size * copies // 64 * 64) if cold else None
    times: dict[str, list[float]] = {name: [] for name in runs}
    reads = []
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run.call, counts[name], WARM_SECONDS) / copies)
        if memory is not None:
            reads.append(read(memory, threads) / copies)
    return {
        "columns": product.columns, "rows": product.rows, "M": product.count, "format": product.form, "threads": threads,
        "weights": "cold" if cold else "hot", "copies": copies, "bytes": size, "torch_dtype": dtype, "error_of_bound": errors,
        "microseconds": {name: _summary(values) for name, values in times.items()},
        "call_microseconds": {name: value * 1e6 for name, value in empty.items()},
        "read": _summary(reads) if reads else None,
    }  # fmt: skip


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values) * 1e6, "least": min(values) * 1e6}


def shown(row: dict[str, Any]) -> str:
    """A row of the table in text."""
    times, calls = row["microseconds"], row["call_microseconds"]
    parts = [f"{row['columns']:>4} -> {row['rows']:<4} {row['format']:<18} M={row['M']:<2} {row['weights']:<4} {row['threads']}t"]
    for name, value in times.items():
        call = f" (call {calls[name]:.1f})" if calls[name] > 0.05 else ""
        parts.append(f"{name} {value['median']:.1f}/{value['least']:.1f} us{call}")
    for ratio, kind in ((ratios(row, "median", net=False), "ratio"), (ratios(row, "least", net=False), "of minima")):
        parts.append(f"{kind} fast {ratio['ours fast']:.2f} exact {ratio['ours exact']:.2f}")
    parts.append(f"net {ratios(row, 'least', net=True)['ours fast']:.2f}")
    if row["read"]:
        for name in ("ours fast", "ours exact"):
            share = {kind: row["read"][kind] / times[name][kind] for kind in ("median", "least")}
            speed = row["bytes"] / times[name]["median"] / 1e3
            parts.append(f"{name} {speed:.1f} GB/s, {share['median']:.0%} of reading ({share['least']:.0%} of minima)")
        parts.append(f"read {row['bytes'] / row['read']['median'] / 1e3:.1f} GB/s")
    return "  ".join(parts)


def ratios(row: dict[str, Any], kind: str, *, net: bool) -> dict[str, float]:
    """Our times over those of the better peer; net: without what its calls cost when they do nothing."""
    times, calls = row["microseconds"], row["call_microseconds"]
    peer = min(times[name][kind] - net * calls[name] for name in ("onnxruntime", "torch"))
    return {name: times[name][kind] / peer for name in ("ours fast", "ours exact")}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="M")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="symmetric groups of 32 only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{datetime.date.today()}-matmul-cpu.json")
    options = parser.parse_args()
    forms = FORMATS[:1] if options.quick else FORMATS
    products = [Product(*shape, form, count) for shape in SHAPES for form in forms for count in options.rows]
    ours, read = Ours(products), read_loop()
    rows = []
    for product in products:
        for cold in (False, True) if product.count == 1 else (False,):
            for threads in options.threads:
                rows.append(measure(ours, product, cold, threads, options.rounds, read))
                print(shown(rows[-1]), flush=True)
    about = {
        "date": datetime.date.today().isoformat(), "processor": platform.processor() or platform.machine(), "library": ours.name,
        "last_level_cache": cache_bytes(), "command": " ".join(["python", "-m", "benchmarks.matmul_cpu", *sys.argv[1:]]), "rows": rows,
    }  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(about, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
