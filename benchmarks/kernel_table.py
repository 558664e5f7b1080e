"""Print every Triton kernel of a model shaped like SmolLM2-135M as built for an architecture: registers, shared memory, instructions.

Run from the root of the repository: `python -m benchmarks.kernel_table sm90 [--format "int8 channel sym fp16"]`, or `--scheme w4a8`. Needs
no GPU.
"""

from __future__ import annotations

import argparse

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.codegen.triton.tiles import ARCHITECTURES
from qcompile.ir import size
from qcompile.ir.lowered import KernelSpec
from tests.codegen.triton import activation_specs, specs


def kernels_of(form: str, scheme: str | None) -> list[KernelSpec]:
    """The whole model with weights of a format, or what a scheme with quantized activations adds to it."""
    return specs.small_llama(form) if scheme is None else activation_specs.small_llama(scheme)


def main() -> None:
    """Build and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=list(ARCHITECTURES))
    parser.add_argument("--format", default="int4 g64 sym fp16", help="how linear layers are quantized")
    parser.add_argument("--scheme", choices=list(activation_specs.PRESETS), help="instead: the kernels of quantized activations")
    arguments = parser.parse_args()
    backend = TritonBackend(arguments.arch)
    emitted = [backend.emit(spec) for spec in kernels_of(arguments.format, arguments.scheme)]
    kernels, binaries = build_kernels(emitted, arguments.arch, cache=kernel_cache())
    print(f"{'kernel':28}{'sizes':18}{'launch':20}{'grid':36}{'warps':>6}{'registers':>10}{'shared':>8}{'bytes':>8}  expects")
    for kernel in kernels:
        for launch in kernel.launches:
            grid = " x ".join(size.text(extent) for extent in launch.grid)
            name = f"{kernel.spec.operator}[{kernel.spec.bucket}]" if kernel.spec.bucket else kernel.spec.operator
            sizes = " ".join(f"{letter}{value}" for letter, value in kernel.spec.sizes)
            use = f"{launch.num_warps:>6}{launch.registers:>10}{launch.shared_bytes:>8}{len(binaries[launch.binary]):>8}"
            print(f"{name:28}{sizes:18}{launch.function:20}{grid:36}{use}  {', '.join(kernel.expects)}")


if __name__ == "__main__":
    main()
