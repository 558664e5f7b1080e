"""Which backend serves a target, and the build of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from qcompile.codegen.reference import ReferenceBackend
from qcompile.errors import EngineError
from qcompile.ir.lowered import Backend, Kernel, Plan
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.target import Target

_SERVED_BY = {"cpu": "torch_cpu", "onnx": "onnxruntime"}
"""Architecture -> the engine that runs operators by kernels that are not made here."""


def backend_for(target: Target, engine: str | None = None) -> Backend:
    """Triton for GPUs; C++ where `engine` is `native`; for others plain definitions, under the name of the engine that serves them.

    Raises:
        EngineError: if `native` is asked of a target that is none of the CPU's.
    """
    if engine == "native":
        return _native(target)
    if target.is_cuda:
        from qcompile.codegen.triton.backend import TritonBackend

        return TritonBackend(target.arch)
    return ReferenceBackend(_SERVED_BY.get(target.arch, "reference"))


def _native(target: Target) -> Backend:
    from qcompile.codegen.cpp.backend import CppBackend
    from qcompile.codegen.cpp.build import find_compiler, no_compiler

    if target.arch not in ("cpu", "reference"):
        raise EngineError(f"engine native: expected a target cpu-* or reference-*, got {target}; leave engine out")
    if find_compiler() is not None:
        return CppBackend()
    served = _SERVED_BY.get(target.arch, "reference")
    warnings.warn(f"{target}: served by {served} in place of native kernels: {no_compiler()}", stacklevel=3)
    return ReferenceBackend(served)


def build(
    kernels: Mapping[str, Kernel], target: Target, plan: Plan, lines: Mapping[str, str] | None = None
) -> tuple[dict[str, Kernel], dict[str, bytes]]:
    """Build kernels ahead of time: the kernels with what was built filled in, and what was built by file name.

    Args:
        kernels: as a backend emitted them.
        target: what they are for.
        plan: what calls them; C++ has a function for its entries too.
        lines: node -> where it stands in the model's source.

    Raises:
        KernelBuildError: for a kernel that does not build, spills, exceeds shared memory or lacks an instruction it must have.
    """
    if not target.is_cuda:
        made = {name: kernel for name, kernel in kernels.items() if kernel.source}
        return made, _libraries(made, target, plan, lines or {}) if made else {}
    from qcompile.codegen.build_cache import kernel_cache
    from qcompile.codegen.triton.build import build_kernels

    built, binaries = build_kernels(list(kernels.values()), target.arch, cache=kernel_cache())
    return {kernel.name: kernel for kernel in built}, binaries


def _libraries(kernels: Mapping[str, Kernel], target: Target, plan: Plan, lines: Mapping[str, str]) -> dict[str, bytes]:
    from qcompile.codegen.build_cache import kernel_cache
    from qcompile.codegen.cpp.build import build_libraries
    from qcompile.codegen.cpp.entry import library_source

    source = library_source(plan, kernels, f"Kernels for {target}.", lines)
    return {NATIVE_SOURCE: source.encode(), **build_libraries(source, kept_in=kernel_cache())}
