"""An entry point bound to fixed sizes: static tensors, and a list of actions over them that can be run or captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.allowed import ALLOWED
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Entry, Kernel, Launch, Step
from qcompile.ir.memory import buffers_in, undecided_sizes
from qcompile.ir.size import evaluate
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.launch import FrozenLaunch, stride_axes
from qcompile.runtime.cuda.memory import allocate, planned_for
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.operands import Operand, bind_arguments, bucket_count, is_dense, local_sizes, named_tensors, output_name
from qcompile.runtime.cuda.steps import Clear, Copy, TorchStep, bind_value, results

Action = Callable[[], None]


@dataclass
class Constants:
    """An artifact's constants on the device: each uploaded once per layout, when first asked for."""

    read: Callable[[str], Tensor]
    device: torch.device
    _uploaded: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in self._uploaded.values())

    def get(self, name: str, layout: str = "") -> Tensor:
        """The constant called `name` as the layout has it ("" is the artifact's own)."""
        key = (name, layout)
        if key not in self._uploaded:
            stored = self.read(name).to(self.device, copy=True).contiguous()
            self._uploaded[key] = apply_layout(layout, stored) if layout else stored
        return self._uploaded[key]


class Arena:
    """Bytes shared by the programs of an engine, of which one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        """An empty arena."""
        self.device = device
        self._kept: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all that was handed out."""
        return sum(tensor.numel() for tensor in self._kept)

    def take(self, size: int) -> Tensor:
        """At least `size` bytes, the same memory as last time where that suffices; what was handed out before stays alive."""
        if not self._kept or self._kept[-1].numel() < size:
            self._kept.append(torch.empty(max(size, 1), dtype=torch.uint8, device=self.device))
        return self._kept[-1]


@dataclass(frozen=True)
class Context:
    """What all programs of an engine share."""

    driver: Driver
    device: torch.device
    stream: int
    modules: Modules
    constants: Constants
    arena: Arena
    workspace: Arena


class Program:
    """An entry at fixed sizes. `inputs` are static tensors that a caller writes before `run`, `outputs` are valid after it.

    `actions` are in order, `spans` says which of them (from, to) a node became; `obstacles` which a CUDA graph cannot hold, and why.
    """

    def __init__(self, context: Context, entry: Entry, sizes: Mapping[str, int], states: Mapping[str, Tensor]) -> None:
        """Bind every step. `sizes` gives a value to every name in the entry's shapes; `states` are the caller's: the cache and its inputs.

        Raises:
            EngineError: where a kernel's assumptions do not hold, naming kernel and parameter.
        """
        self.context, self.entry, self.sizes = context, entry, dict(sizes)
        undecided = sorted(undecided_sizes(entry))
        if undecided:
            raise EngineError(
                f"engine cuda: expected sizes that the inputs decide, got {undecided[0]}, which values decide; load the artifact with "
                "engine='torch_cpu', or cut the model before the node that makes it"
            )
        self.actions: list[Action] = []
        self.obstacles: list[str] = []
        self.spans: dict[str, tuple[int, int]] = {}
        self._tensors: dict[str, Tensor] = dict(states)
        planned = planned_for(entry, sizes)
        arena = context.arena.take(planned.arena_bytes)
        for buffer in planned.buffers.values():
            if buffer.kind in ("input", "intermediate", "output") and not buffer.alias and buffer.name not in states:
                self._tensors[buffer.name] = allocate(buffer, sizes, context.device, arena if buffer.offset >= 0 else None)
        for step in entry.steps:
            before = len(self.actions)
            self._bind(step)
            self.spans[step.node] = (before, len(self.actions))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The static tensors a caller writes."""
        return {name: self._tensors[name] for name in self.entry.inputs if self.entry.buffers[name].kind == "input"}

    @property
    def outputs(self) -> list[Tensor]:
        """The results, in place: copy them before the next run."""
        return [self.tensor(name) for name in self.entry.outputs]

    def tensor(self, name: str) -> Tensor:
        """The tensor behind a buffer; a constant is uploaded when first asked for."""
        if name not in self._tensors and self.entry.buffers[name].kind == "constant":
            self._tensors[name] = self.context.constants.get(name)
        return self._tensors[name]

    def run(self) -> None:
        """Run all actions in order on the engine's stream."""
        for action in self.actions:
            action()

    def _value(self, value: Any, step: Step) -> Any:
        return bind_value(value, self.tensor, lambda size: evaluate(size, self.sizes), step)

    def _bind(self, step: Step) -> None:
        operator = ALLOWED[step.operator]
        # Constants that a kernel wants in a layout of its own are never uploaded as the artifact stores them.
        kernel = self.context.modules.kernel(step, self._count(step, operator)) if step.kernels else None
        if kernel is not None:
            self._bind_kernel(step, operator, kernel)
            return
        args = [self._value(value, step) for value in step.args]
        kwargs = {key: self._value(value, step) for key, value in step.kwargs.items()}
        if step.outputs and all(self.entry.buffers[name].alias for name in step.outputs):
            self._tensors |= dict(zip(step.outputs, results(operator(*args, **kwargs)), strict=True))
            return
        action = TorchStep(step, operator, args, kwargs, [self._tensors[name] for name in step.outputs])
        obstacle = action.obstacle(self.context.device)
        if obstacle:
            self.obstacles.append(f"{step.node or step.operator} ({step.operator}): {obstacle}")
        self.actions.append(action)

    def _operands(self, step: Step, operator: Callable[..., Any], layouts: Mapping[str, str]) -> dict[str, Any]:
        operands: dict[str, Any] = {}
        for name, value in bind_arguments(step.operator, operator, step.args, step.kwargs).items():
            buffer = next(buffers_in(value), "")
            if name in layouts and buffer:
                operands[name] = self.context.constants.get(buffer, layouts[name])
            else:
                operands[name] = self._value(value, step)
        return operands | {output_name(index): self._tensors[name] for index, name in enumerate(step.outputs)}

    def _count(self, step: Step, operator: Callable[..., Any]) -> int:
        activations = {
            name: self._value(value, step)
            for name, value in bind_arguments(step.operator, operator, step.args, step.kwargs).items()
            if any(self.entry.buffers[buffer].kind != "constant" for buffer in buffers_in(value))
        }
        return bucket_count(step.operator, local_sizes(step.operator, activations, self.sizes))

    def _bind_kernel(self, step: Step, operator: Callable[..., Any], kernel: Kernel) -> None:
        values = self._operands(step, operator, dict(kernel.layouts))
        sizes = local_sizes(step.operator, values, self.sizes)
        tensors = named_tensors(values)
        for launch in kernel.launches:
            tensors |= self._copies(step, launch, tensors)
        operands = {name: Operand.of(tensor) for name, tensor in tensors.items()} | self._workspaces(kernel, sizes)
        for launch in kernel.launches:
            function = self.context.modules.function(kernel, launch)
            self.actions.append(FrozenLaunch(self.context.driver, function, kernel.name, launch, operands, sizes, self.context.stream))

    def _copies(self, step: Step, launch: Launch, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        pointers = [str(parameter.value) for parameter in launch.parameters if parameter.kind == "pointer"]
        for name in pointers:
            tensor = tensors.get(name)
            if tensor is None or name.startswith("out") or is_dense(tensor.shape, tensor.stride(), stride_axes(launch, name, tensor.dim())):
                continue
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            self.actions.append(Copy(step.node, tensor, copies[name]))
            if self.context.device.type != "cuda":
                self.obstacles.append(f"{step.node or step.operator} ({step.operator}): {name} is copied on {self.context.device.type}")
        return copies

    def _workspaces(self, kernel: Kernel, sizes: Mapping[str, int]) -> dict[str, Operand]:
        offset, spans = 0, {}
        for workspace in kernel.workspaces:
            size = evaluate(workspace.bytes, sizes)
            spans[workspace.name] = (offset, size, workspace.zeroed)
            offset += -(-size // 256) * 256
        memory = self.context.workspace.take(offset) if spans else None
        found: dict[str, Operand] = {}
        for name, (start, size, zeroed) in spans.items():
            assert memory is not None
            tensor = memory[start : start + size]
            found[name] = Operand.workspace(tensor)
            if zeroed:
                self.actions.append(Clear(self.context.driver, kernel.name, tensor, self.context.stream))
        return found
