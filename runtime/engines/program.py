"""An entry point bound to fixed sizes: every buffer is a tensor, every view is made, a call only runs operators.

Where values decide a size (boxes that stay), steps from the first one that makes such a size on are bound while they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.allowed import ALLOWED
from qcompile.ir.lowered import Buffer, Entry, Step
from qcompile.ir.memory import dtype_of, size_names, undecided_sizes
from qcompile.ir.size import evaluate

Call = Callable[[], object]
Kernels = Callable[[Step, "Operands"], Call | None]


class Operands:
    """The tensors of one step, by position, and where its results go."""

    def __init__(self, args: list[Any], kwargs: dict[str, Any], outputs: list[Tensor], names: list[str | None]) -> None:
        """`names[i]` is the buffer that `args[i]` is, or None if it is no tensor."""
        self.args, self.kwargs, self.outputs, self.names = args, kwargs, outputs, names

    @property
    def out(self) -> Tensor:
        """The first result."""
        return self.outputs[0]


class Program:
    """The calls of an entry in order, over an arena that they share; `inputs` are written before `run`, `outputs` read after."""

    def __init__(
        self,
        entry: Entry,
        sizes: Mapping[str, int],
        constants: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        arena: Tensor,
        kernels: Kernels,
    ) -> None:
        """Bind every buffer and every step.

        Args:
            entry: planned for at least `sizes`.
            sizes: batch, sequence, and the cache's.
            constants: every constant the entry names, in the form that `kernels` wants.
            states: the cache's tensors by name, and inputs that stand in memory of the caller's.
            arena: uint8, at least `entry.arena_bytes`.
            kernels: how a step runs; None leaves it to the operator itself.
        """
        self.entry, self.sizes, self._given = entry, dict(sizes), dict(sizes)
        self.tensors: dict[str, Tensor] = {**constants, **states}
        names = undecided_sizes(entry)
        undecided = {name for name, buffer in entry.buffers.items() if names & size_names(buffer)} if names else set()
        for name, buffer in entry.buffers.items():
            if name in undecided:
                continue
            if buffer.kind == "intermediate" and not buffer.alias:
                self.tensors[name] = self._place(buffer, arena)
            elif buffer.kind in ("input", "output") and not buffer.alias and name not in states:
                self.tensors[name] = ordered(torch.empty(self._shape(buffer, stored=True), dtype=dtype_of(buffer.dtype)), buffer)
        first = next((index for index, step in enumerate(entry.steps) if undecided & set(step.outputs)), len(entry.steps))
        self._late, self._kernels, self._undecided = entry.steps[first:], kernels, undecided
        self.calls: list[Call] = [call for step in entry.steps[:first] if (call := self._bind(step, kernels)) is not None]

    @cached_property
    def step(self) -> tuple[Any, Any, Tensor]:
        """Of one token for each sequence: tokens and positions as flat arrays over the inputs' memory, and the logits [B, V]."""
        ids, positions = (self.tensors[name].view(-1).numpy() for name in ("input_ids", "positions"))
        return ids, positions, self.tensors[self.entry.outputs[0]][:, -1]

    def run(self) -> None:
        """All steps on what the inputs hold."""
        for call in self.calls:
            call()
        self.sizes = dict(self._given)
        for step in self._late:
            self._run_late(step)

    def _shape(self, buffer: Buffer, *, stored: bool = False) -> list[int]:
        shape = [evaluate(size, self.sizes) for size in buffer.shape]
        return [shape[axis] for axis in buffer.order] if stored and buffer.order else shape

    def _place(self, buffer: Buffer, arena: Tensor) -> Tensor:
        shape, dtype = self._shape(buffer, stored=True), dtype_of(buffer.dtype)
        if buffer.offset < 0:
            return ordered(torch.empty(shape, dtype=dtype), buffer)
        count = math.prod(shape) * dtype.itemsize
        return ordered(arena[buffer.offset : buffer.offset + count].view(dtype).view(shape), buffer)

    def _run_late(self, step: Step) -> None:
        """Bind and run a step; results of sizes that the operator alone knows are taken as they come, and their sizes noted."""
        made = [self.entry.buffers[name] for name in step.outputs if name in self._undecided and not self.entry.buffers[name].alias]
        if any(size_names(buffer) - set(self.sizes) for buffer in made):
            args, kwargs = self._arguments(step)
            result = ALLOWED[step.operator](*args, **kwargs)
            for name, tensor in zip(step.outputs, result if isinstance(result, tuple | list) else (result,), strict=True):
                self._note(self.entry.buffers[name], tensor)
                self.tensors[name] = tensor
            return
        for buffer in made:
            self.tensors[buffer.name] = ordered(torch.empty(self._shape(buffer, stored=True), dtype=dtype_of(buffer.dtype)), buffer)
        call = self._bind(step, self._kernels)
        if call is not None:
            call()

    def _note(self, buffer: Buffer, tensor: Tensor) -> None:
        """Learn sizes from a result, which must be of the kind that the plan says."""
        for size, length in zip(buffer.shape, tensor.shape, strict=True):
            if isinstance(size, str):
                self.sizes.setdefault(size, length)
        expected = self._shape(buffer)
        if list(tensor.shape) != expected or tensor.dtype != dtype_of(buffer.dtype):
            raise EngineError(
                f"{buffer.name}: expected {buffer.dtype} {expected}, got {tensor.dtype} {list(tensor.shape)}; the plan is not this model's"
            )

    def _bind(self, step: Step, kernels: Kernels) -> Call | None:
        args, kwargs = self._arguments(step)
        if step.outputs and self.entry.buffers[step.outputs[0]].alias:
            self._bind_view(step, args, kwargs)
            return None
        outputs = [self.tensors[name] for name in step.outputs]
        names = [argument.get("buffer") if isinstance(argument, dict) else None for argument in step.args]
        operands = Operands(args, kwargs, outputs, names)
        return kernels(step, operands) or by_operator(step.operator, operands)

    def _arguments(self, step: Step) -> tuple[list[Any], dict[str, Any]]:
        return [self._value(argument) for argument in step.args], {name: self._value(value) for name, value in step.kwargs.items()}

    def _bind_view(self, step: Step, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Views of buffers that stay where they are need no call."""
        result = ALLOWED[step.operator](*args, **kwargs)
        for name, tensor in zip(step.outputs, result if isinstance(result, tuple | list) else (result,), strict=True):
            self.tensors[name] = tensor

    def _value(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind, content = next(iter(value.items()))
        if kind == "buffer":
            return self.tensors[content]
        if kind == "size":
            return evaluate(content, self.sizes)
        return dtype_of(content) if kind == "dtype" else float(content)


def ordered(stored: Tensor, buffer: Buffer) -> Tensor:
    """The tensor in its own axes, where memory has them in `buffer.order`."""
    return stored.permute([buffer.order.index(axis) for axis in range(len(buffer.order))]) if buffer.order else stored


def by_operator(name: str, operands: Operands) -> Call:
    """Call the operator's reference and copy its results to their buffers."""
    operator = ALLOWED[name]
    args, kwargs, outputs = operands.args, operands.kwargs, operands.outputs
    if len(outputs) == 1:
        return lambda: outputs[0].copy_(operator(*args, **kwargs))

    def run() -> None:
        result = operator(*args, **kwargs)
        for place, tensor in zip(outputs, result if outputs else (), strict=True):
            place.copy_(tensor)

    return run
