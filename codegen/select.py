"""Which backend serves a target, and the build of its kernels."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.codegen.reference import ReferenceBackend
from qcompile.ir.lowered import Backend, Kernel
from qcompile.target import Target

_SERVED_BY = {"cpu": "torch_cpu", "onnx": "onnxruntime"}
"""Architecture -> the engine that runs operators by kernels that are not made here."""


def backend_for(target: Target) -> Backend:
    """Triton for GPUs; for others plain definitions, under the name of the engine that serves them its own way."""
    if target.is_cuda:
        from qcompile.codegen.triton.backend import TritonBackend

        return TritonBackend(target.arch)
    return ReferenceBackend(_SERVED_BY.get(target.arch, "reference"))


def build(kernels: Mapping[str, Kernel], target: Target) -> tuple[dict[str, Kernel], dict[str, bytes]]:
    """Build kernels ahead of time: the kernels with what was built filled in, and binaries by file name.

    Raises:
        KernelBuildError: for a kernel that does not build, spills, exceeds shared memory or lacks an instruction it must have.
    """
    if not target.is_cuda:
        return {name: kernel for name, kernel in kernels.items() if kernel.source}, {}
    from qcompile.codegen.triton.build import build_kernels, kernel_cache

    built, binaries = build_kernels(list(kernels.values()), target.arch, cache=kernel_cache())
    return {kernel.name: kernel for kernel in built}, binaries
