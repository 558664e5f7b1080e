"""What a program does at run time, one action after the other: kernel launches, zeroing, and references run by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.lowered import Step
from qcompile.ir.memory import dtype_of
from qcompile.ir.size import from_json
from qcompile.runtime.cuda.driver import Driver

HOST_SYNCHRONISING = frozenset(
    {
        "qcompile.cache_append_.default",
        "qcompile.cache_append.default",
        "qcompile.cache_attend.default",
        "qcompile.append_packed_.default",
        "qcompile.append_packed.default",
        "qcompile.cache_attend_packed.default",
        "qcompile.settle_.default",
        "qcompile.retain_.default",
        "qcompile.attend_settled.default",
        "qcompile.attend_ranked_.default",
        "qcompile.attend_ranked.default",
        "qcompile.cache_store_.default",
        "qcompile.cache_store.default",
        "qcompile.attend_rematerialized.default",
        "qcompile.attend_settled_sources.default",
        "qcompile.moe_experts.default",
    }
)
"""Operators whose reference reads device values on the host (a length, a mask's count, the experts in use)."""


@dataclass(frozen=True)
class Clear:
    """Zero a workspace."""

    driver: Driver
    kernel: str
    memory: Tensor
    stream: int

    def __call__(self) -> None:
        """Put the zeroing on the stream."""
        self.driver.clear(self.memory.data_ptr(), self.memory.numel(), self.stream, f"kernel {self.kernel}")


@dataclass(frozen=True)
class TorchStep:
    """An operator without a kernel: its torch reference, whose results are copied to where later steps look for them."""

    step: Step
    operator: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]

    def __call__(self) -> None:
        """Run it on the current stream."""
        for place, result in zip(self.outputs, results(self.operator(*self.args, **self.kwargs)), strict=True):
            place.copy_(result)

    def obstacle(self, device: torch.device) -> str:
        """Why a CUDA graph cannot hold this step, or an empty string."""
        if device.type != "cuda":
            return f"it is computed on {device.type}"
        if self.step.operator in HOST_SYNCHRONISING:
            return "its reference reads device values on the host"
        tags = getattr(self.operator, "tags", ())
        dynamic = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
        return "its shape depends on data" if any(tag in tags for tag in dynamic) else ""


@dataclass(frozen=True)
class Copy:
    """A contiguous copy for a kernel that takes no strides."""

    node: str
    source: Tensor
    target: Tensor

    def __call__(self) -> None:
        """Copy on the current stream."""
        self.target.copy_(self.source)


def results(value: Any) -> tuple[Tensor, ...]:
    """The tensors an operator gave back: none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def bind_value(value: Any, tensors: Callable[[str], Tensor], evaluate: Callable[[Any], int], step: Step) -> Any:
    """An argument of a step as its operator takes it.

    Raises:
        EngineError: for an argument of an unknown kind.
    """
    if isinstance(value, list | tuple):
        return [bind_value(item, tensors, evaluate, step) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    readers: dict[str, Callable[[Any], Any]] = {
        "buffer": tensors, "size": lambda size: evaluate(from_json(size)), "dtype": dtype_of, "float": float
    }  # fmt: skip
    if kind not in readers:
        place = step.node or step.operator
        raise EngineError(f"step {place}: expected an argument of {', '.join(readers)}, got {kind!r}; compile the model again")
    return readers[kind](content)
