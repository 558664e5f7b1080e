"""Which backend serves a target, and the build of its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcompile.codegen.reference import ReferenceBackend
from qcompile.errors import EngineError
from qcompile.ir.lowered import Backend, Kernel, Plan
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.target import Target

_SERVED_BY = {"cpu": "torch_cpu", "onnx": "onnxruntime"}
"""Architecture -> the engine that runs operators by kernels that are not made here."""


def backend_for(target: Target, engine: str | None = None) -> Backend:
    """Triton for GPUs; C++ for CPUs, and for `reference-*` where `engine` is `native`; else plain definitions, named by who serves them.

    Without a compiler there are plain definitions in place of C++, which say why (`instead_of_native`).

    Raises:
        EngineError: if `native` is asked of a target that is none of the CPU's.
    """
    if target.is_cuda and engine != "native":
        from qcompile.codegen.triton.backend import TritonBackend

        return TritonBackend(target.arch)
    if engine == "native" or (engine is None and target.arch == "cpu"):
        return _native(target)
    return ReferenceBackend("reference" if engine == "reference" else _SERVED_BY.get(target.arch, "reference"))


def _native(target: Target) -> Backend:
    from qcompile.codegen.cpp.backend import CppBackend
    from qcompile.codegen.cpp.build import find_compiler, no_compiler

    if target.arch not in ("cpu", "reference"):
        raise EngineError(f"engine native: expected a target cpu-* or reference-*, got {target}; leave engine out")
    return CppBackend() if find_compiler() is not None else without_native(target, no_compiler())


def without_native(target: Target, reason: str) -> ReferenceBackend:
    """What serves a target in place of C++ kernels, for a reason that its coverage table gives."""
    return ReferenceBackend(_SERVED_BY.get(target.arch, "reference"), reason)


def instead_of_native(backend: Backend) -> str:
    """Why this backend serves in place of C++ kernels; "" where it does not."""
    return backend.instead if isinstance(backend, ReferenceBackend) else ""


def build(
    kernels: Mapping[str, Kernel], target: Target, plan: Plan, lines: Mapping[str, str] | None = None, *,
    instruction_sets: Sequence[str] | None = None, failed_in: Path | None = None,
) -> tuple[dict[str, Kernel], dict[str, bytes]]:  # fmt: skip
    """Build kernels ahead of time: the kernels with what was built filled in, and what was built by file name.

    Args:
        kernels: as a backend emitted them.
        target: what they are for.
        plan: what calls them; C++ has a function for its entries too.
        lines: node -> where it stands in the model's source.
        instruction_sets: what libraries of C++ are built for; by default all that this machine's compiler knows.
        failed_in: folder that keeps a C++ source which does not compile; by default `QCOMPILE_CACHE`/failed.

    Raises:
        KernelBuildError: for a kernel that does not build, spills, exceeds shared memory or lacks an instruction it must have.
    """
    if not target.is_cuda:
        made = {name: kernel for name, kernel in kernels.items() if kernel.source}
        return made, _libraries(made, target, plan, lines or {}, instruction_sets, failed_in) if made else {}
    from qcompile.codegen.build_cache import kernel_cache
    from qcompile.codegen.triton.build import build_kernels

    built, binaries = build_kernels(list(kernels.values()), target.arch, cache=kernel_cache())
    return {kernel.name: kernel for kernel in built}, binaries


def _libraries(
    kernels: Mapping[str, Kernel], target: Target, plan: Plan, lines: Mapping[str, str], names: Sequence[str] | None, failed_in: Path | None
) -> dict[str, bytes]:
    from qcompile.codegen.build_cache import kernel_cache
    from qcompile.codegen.cpp.build import build_libraries
    from qcompile.codegen.cpp.entry import library_source

    source = library_source(plan, kernels, f"Kernels for {target}.", lines)
    return {NATIVE_SOURCE: source.encode(), **build_libraries(source, names, kept_in=kernel_cache(), failed_in=failed_in)}
