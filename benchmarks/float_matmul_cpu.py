"""Products of weights that are numbers on the CPU beside torch's (MKL for float32, oneDNN for bf16): one process, one thread, in turn.

    python -m benchmarks.float_matmul_cpu [--rows 1 64] [--calls 40]

Weights [N, K] of 576 -> 1536 and 4096 -> 4096, hot. Times are the least of all calls; the ratio is ours over torch's. Each product is
compared with float64 first: within K + 8 units of float32 of the sum of magnitudes, and half a unit of what is stored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.matmul_cpu import SHAPES, spec
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.build import build_libraries, instruction_sets
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Kernel
from qcompile.runtime.native.library import Library
from qcompile.runtime.native.program import table_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 3


def emitted(kind: str, columns: int, rows: int, count: int) -> Kernel:
    """The kernel for `count` rows of x."""
    formats = dict.fromkeys(("x", "weight", "out"), kind)
    return CppBackend().emit(spec("linear", {"N": rows, "K": columns}, formats, "m1" if count == 1 else "m2-63"))


def least(call: Callable[[], object], calls: int) -> float:
    """Seconds of the fastest call."""
    found = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - start)
    return found


def require_close(made: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise SystemExit where a product is further from float64 than rounding explains."""
    exact = x.double() @ weight.double().t()
    sums = (weight.shape[1] + 8) * 2.0**-24 * (x.double().abs() @ weight.double().abs().t())
    stored = 0.0 if made.dtype == torch.float32 else torch.finfo(made.dtype).eps / 2
    if not bool(((made.double() - exact).abs() <= sums + stored * (exact.abs() + sums)).all()):
        raise SystemExit(
            f"{made.dtype}: expected a product within its bound, got one that is {(made.double() - exact).abs().max():.2e} off"
        )


def main() -> None:
    """Print a line for each product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--calls", type=int, default=40)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(kind, *shape, count) for kind in DTYPES for shape in SHAPES for count in chosen.rows]
    kernels = {case: emitted(*case) for case in cases}
    source = kernels_source({kernel.name: kernel for kernel in kernels.values()}.values(), "Products of numbers.")
    ((name, code),) = build_libraries(source, instruction_sets()[:1]).items()
    library = Library(name, code)
    for (kind, columns, rows, count), kernel in kernels.items():
        weight, x = torch.randn(rows, columns).to(DTYPES[kind]), torch.randn(count, columns).to(DTYPES[kind])
        out, packed = torch.empty(count, rows, dtype=DTYPES[kind]), apply_layout(dict(kernel.layouts)["weight"], weight)
        table, function = table_of([x, packed, out]), library.entry(f"qcompile_{kernel.name}")
        function(table.data_ptr(), 1)
        require_close(out, x, weight)
        times = [
            (
                least(lambda call=function, given=table: call(given.data_ptr(), 1), chosen.calls),
                least(lambda a=x, b=weight: torch.nn.functional.linear(a, b), chosen.calls),
            )
            for _ in range(ROUNDS)
        ]
        ours, theirs = (min(column) for column in zip(*times, strict=True))
        work = 2e-9 * count * rows * columns
        print(
            f"{kind} {columns} -> {rows}, {count} rows: ours {ours * 1e6:.0f} us ({work / ours:.0f} GF/s, {weight.nbytes / ours / 1e9:.0f} "
            f"GB/s), torch {theirs * 1e6:.0f} us ({work / theirs:.0f} GF/s), ratio {ours / theirs:.2f}"
        )


if __name__ == "__main__":
    main()
