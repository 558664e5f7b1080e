"""Kernels by themselves: one library for many of them, called with tensors by the names of operands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.build_cache import kernel_cache
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Kernel, KernelSpec
from qcompile.ir.native import INSTRUCTION_SETS
from qcompile.runtime.native.library import Library
from qcompile.runtime.native.processor import features
from qcompile.runtime.native.program import table_of

RUNNABLE = tuple(name for name, wanted in INSTRUCTION_SETS.items() if wanted <= features())
"""Instruction sets of this machine's processor."""


@dataclass
class Kernels:
    """A library of kernels by specification."""

    library: Library
    kernels: dict[KernelSpec, Kernel]

    def __call__(self, spec: KernelSpec, operands: Mapping[str, Tensor], threads: int = 1) -> None:
        """Run the kernel of a specification; constants are given as the artifact stores them."""
        kernel = self.kernels[spec]
        layouts = dict(kernel.layouts)
        names = [str(parameter.value) for parameter in kernel.launches[0].parameters]
        tensors = [apply_layout(layouts[name], operands[name]) if name in layouts else operands[name] for name in names]
        table = table_of(tensors)
        self.library.entry(f"qcompile_{kernel.name}")(table.data_ptr(), threads)


def library_of(specs: Iterable[KernelSpec], instruction_set: str, optimization: str = "-O1") -> Kernels:
    """The kernels of all specifications; -O0 is quickly built, -O3 is what users get, and what is computed depends on neither."""
    kernels = {spec: CppBackend().emit(spec) for spec in dict.fromkeys(specs)}
    distinct = {kernel.name: kernel for kernel in kernels.values()}
    source = kernels_source(distinct.values(), "Kernels of a test.")
    ((name, code),) = build_libraries(source, [instruction_set], kept_in=kernel_cache(), extra=(optimization,)).items()
    return Kernels(Library(name, code), kernels)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
