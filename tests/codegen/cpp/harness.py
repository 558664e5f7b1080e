"""Kernels by themselves: one library for many of them, called with tensors by the names of operands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qcompile.codegen.build_cache import kernel_cache
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Kernel, KernelSpec
from qcompile.ir.native import INSTRUCTION_SETS
from qcompile.runtime.native.library import Entry, Library
from qcompile.runtime.native.processor import features
from qcompile.runtime.native.program import table_of
from tests.codegen.cpp import sanitized
from tests.codegen.cpp.guarded import PLACES, guarded

RUNNABLE = tuple(name for name, wanted in INSTRUCTION_SETS.items() if wanted <= features())
"""Instruction sets of this machine's processor."""


@dataclass
class Kernels:
    """A library of kernels by specification."""

    library: Library
    kernels: dict[KernelSpec, Kernel]

    def __call__(self, spec: KernelSpec, operands: Mapping[str, Tensor], threads: int = 1) -> None:
        """Run the kernel of a specification; constants are given as the artifact stores them."""
        if sanitized.PARTIAL and spec not in self.kernels:
            pytest.skip("not in the part of the grid that was built")
        kernel = self.kernels[spec]
        layouts = dict(kernel.layouts)
        names = [str(parameter.value) for parameter in kernel.launches[0].parameters]
        tensors = {name: apply_layout(layouts[name], operands[name]) if name in layouts else operands[name] for name in names}
        call = self.library.entry(f"qcompile_{kernel.name}")
        if sanitized.ACTIVE:
            self._call_guarded(spec, call, tensors, threads)
            return
        table = table_of(list(tensors.values()))
        call(table.data_ptr(), threads)

    def _call_guarded(self, spec: KernelSpec, call: Entry, tensors: Mapping[str, Tensor], threads: int) -> None:
        """Once at each place of guarded memory, from the same operands, to the same results."""
        sanitized.cases[spec, self.library.name, tuple(tensor.shape for tensor in tensors.values())] += 1
        results = []
        for place, kept in zip(PLACES, (False, True), strict=True):
            with guarded(tensors, place, write_back=kept) as copies:
                table = table_of(list(copies.values()))
                call(table.data_ptr(), threads)
                results.append([copy.contiguous().view(-1).view(torch.uint8).clone() for copy in copies.values()])
        assert all(map(torch.equal, *results)), "what a kernel makes depends on where its operands lie"


def library_of(specs: Iterable[KernelSpec], instruction_set: str, optimization: str = "-O1") -> Kernels:
    """The kernels of all specifications; -O0 is quickly built, -O3 is what users get, and what is computed depends on neither."""
    kernels = {spec: CppBackend().emit(spec) for spec in sanitized.part_of(specs)}
    distinct = {kernel.name: kernel for kernel in kernels.values()}
    source = kernels_source(distinct.values(), "Kernels of a test.")
    options = {} if sanitized.ACTIVE else {"kept_in": kernel_cache(), "extra": (optimization,)}
    ((name, code),) = build_libraries(source, [instruction_set], **options).items()
    return Kernels(Library(name, code), kernels)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
