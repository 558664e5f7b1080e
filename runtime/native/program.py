"""An entry bound to fixed sizes whose native steps are a few calls: tables of tensors are filled once, when it is bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.lowered import Entry, Step
from qcompile.ir.native import RANK, TENSOR_WORDS, Segment
from qcompile.runtime.engines.program import Call, Kernels, Program
from qcompile.runtime.native.constants import Packed
from qcompile.runtime.native.library import Library


class NativeProgram(Program):
    """A program whose runs of native steps are calls of a library; the steps between them run as `kernels` says."""

    def __init__(
        self, entry: Entry, sizes: Mapping[str, int], constants: Mapping[str, Tensor], states: Mapping[str, Tensor], arena: Tensor,
        kernels: Kernels, *, runs: Sequence[Segment], library: Library, packed: Packed,
    ) -> None:  # fmt: skip
        """As `Program`, with the runs of the entry, and the constants that they read."""
        self._library, self._packed, self._number = library, packed, 0
        self._runs = {call.place: run for run in runs for call in run.calls}
        super().__init__(entry, sizes, constants, states, arena, kernels)

    def _bind(self, step: Step, kernels: Kernels) -> Call | None:
        place, self._number = self._number, self._number + 1
        run = self._runs.get(place)
        if run is None:
            return super()._bind(step, kernels)
        # By the last step of a run every view inside it is made.
        return self._call(run) if place == run.calls[-1].place else None

    def _call(self, run: Segment) -> Call:
        tensors = [self._operand(run, name, layout) for name, layout in run.table]
        table = table_of(tensors)
        function, address = self._library.entry(run.function), table.data_ptr()

        def call(held: object = (tensors, table)) -> None:
            del held
            function(address, torch.get_num_threads())

        return call

    def _operand(self, run: Segment, name: str, layout: str) -> Tensor:
        constant = self.entry.buffers[name].kind == "constant"
        tensor = self._packed[name, layout] if constant else self.tensors[name]
        if tensor.dim() > RANK or (tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            raise EngineError(
                f"{run.function}: {name}: expected at most {RANK} axes, the last one dense, got shape {list(tensor.shape)} and "
                f"strides {list(tensor.stride())}; load with engine='torch_cpu'"
            )
        return tensor


def table_of(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [n, 12]: the address, rank, sizes and strides of each, as `Tensor` of `support.h` has them."""
    rows = []
    for tensor in tensors:
        filled = (0,) * (RANK - tensor.dim())
        rows.append((tensor.data_ptr(), tensor.dim(), *tensor.shape, *filled, *tensor.stride(), *filled))
    return torch.tensor(rows, dtype=torch.int64).view(-1, TENSOR_WORDS)
