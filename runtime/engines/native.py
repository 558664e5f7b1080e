"""C++ kernels of the artifact on the CPU: a decode step is one call of its library, without Python per operator or an allocation.

Steps that have no C++ kernel run as in `torch_cpu`, between the calls.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.collecting import without_collecting
from qcompile.errors import EngineError
from qcompile.ir.lowered import Entry, Plan
from qcompile.ir.memory import buffers_in
from qcompile.ir.native import Segment
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.program import Call, Kernels, Operands, Program
from qcompile.runtime.engines.torch_cpu import TorchCpuEngine
from qcompile.runtime.kv_cache import KVCache
from qcompile.runtime.native.constants import Packed, packed_constants
from qcompile.runtime.native.library import Library, loaded
from qcompile.runtime.native.processor import best_library
from qcompile.runtime.native.program import NativeProgram

_OVER_CACHE = ("qcompile.cache_append_.default", "qcompile.cache_attend.default")
"""What torch_cpu serves by functions that tell each other about the step: beside native ones they run as their definitions."""


class NativeEngine(TorchCpuEngine):
    """Runs an artifact's library."""

    name = "native"

    @without_collecting()
    def __init__(self, contents: ArtifactContents, **sizes: Any) -> None:
        """As `PlanEngine`, over the best library for this processor.

        Raises:
            EngineError: if the artifact has none for this processor, or it was made for another plan.
            UntrustedCodeError: for one that was not built on this machine and that the caller did not allow.
            CapacityError: if the cache has no room for a page for each row.
        """
        self.library = open_library(contents)
        self._runs, _ = contents.native_runs()
        self._packed: Packed = {}
        self._between = contents_between(contents, self._runs)
        self._alone = all(step.operator not in _OVER_CACHE for entry in self._between.plan.entries.values() for step in entry.steps)
        super().__init__(contents, **sizes)

    @without_collecting()
    def prepare(self) -> None:
        """Read the constants into the layouts of the kernels, allocate the cache, and bind the step of one row."""
        if self._packed:
            return
        super().prepare()
        constants = self.contents.constants
        # What decoding reads lies in the order in which it is read.
        runs = [run for name in sorted(self._runs, key=("decode", "prefill", "forward").index) for run in self._runs[name]]
        wanted = dict.fromkeys(item for run in runs for item in run.table if item[0] in constants)
        self._packed = packed_constants(self.library, constants, wanted, torch.get_num_threads())
        if "decode" in self._entries:
            self._program("decode", 1, 1)

    def prepared_constants(self) -> list[tuple[str, Tensor]]:
        """Those that steps between native ones read, as torch_cpu wants them."""
        whole, self.contents = self.contents, self._between
        try:
            return list(super().prepared_constants())
        finally:
            self.contents = whole

    def kernels(self, cache: KVCache | None) -> Kernels:
        """How steps between native ones run."""
        choose = super().kernels(cache)

        def chosen(step: Any, operands: Operands) -> Call | None:
            return None if step.operator in _OVER_CACHE else choose(step, operands)

        return chosen

    def program(self, entry: Entry, sizes: Mapping[str, int], states: Mapping[str, Tensor], arena: Tensor, kernels: Kernels) -> Program:
        """An entry whose native steps call the library."""
        return NativeProgram(
            entry, sizes, self._constants, states, arena, kernels,
            runs=self._runs[entry.name], library=self.library, packed=self._packed,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Bytes of the constants in the forms that the steps want."""
        return super().weight_bytes + sum(tensor.nbytes for tensor in self._packed.values())


def open_library(contents: ArtifactContents) -> Library:
    """The best library of an artifact for this processor.

    Raises:
        EngineError: if there is none, it does not load, or it was made for another plan.
        UntrustedCodeError: for one that was not built on this machine and that the caller did not allow; it is not even loaded.
    """
    name = best_library(contents.binaries)
    if name is None:
        raise EngineError(
            f"engine native: expected a library for this processor, got {', '.join(sorted(contents.binaries)) or 'none'}; compile with "
            "engine='native', or load with engine='native' where there is a C++ compiler"
        )
    contents.require_native(name)
    library = loaded(name, contents.binaries[name])
    if library.plan != contents.native_runs()[1]:
        raise EngineError(f"{name}: expected a library made for the artifact's plan, got one of another; compile the model again")
    return library


def objection(contents: ArtifactContents) -> str:
    """Why no library that came with an artifact may serve it here; "" if one may."""
    name = best_library(contents.binaries)
    if name is None:
        return "the artifact has no library for this processor"
    if name in contents.untrusted:
        return f"{name} was not built on this machine (allow_native=True runs it)"
    try:
        open_library(contents)
    except EngineError as error:
        return str(error).partition("; ")[0]
    return ""


def contents_between(contents: ArtifactContents, runs: Mapping[str, list[Segment]]) -> ArtifactContents:
    """The contents with the steps between native ones only, and the constants that these read."""
    entries = {}
    for name, entry in contents.plan.entries.items():
        native = {call.place for run in runs[name] for call in run.calls}
        steps = tuple(step for place, step in enumerate(entry.steps) if place not in native)
        entries[name] = replace(entry, steps=steps)
    read = {
        name for entry in entries.values() for step in entry.steps for name in buffers_in([*step.args, *step.kwargs.values()])
    }  # fmt: skip
    between = copy.copy(contents)
    between.plan = Plan(entries, contents.plan.kernels)
    between.constants = {name: constant for name, constant in contents.constants.items() if name in read}
    return between
