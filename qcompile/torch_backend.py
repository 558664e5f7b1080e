"""`torch.compile(model, backend="qcompile", options={"target": …})`: a forward pass through the same compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.errors import QCompileError

Compiled = Callable[..., Any]


class _Bound(nn.Module):
    """A captured program whose weights are attributes and whose sizes are values, so that tensors are all it takes."""

    def __init__(self, program: fx.GraphModule, weights: Mapping[int, Tensor], numbers: Mapping[int, Any]) -> None:
        super().__init__()
        self.program = program
        self.numbers = dict(numbers)
        self.count = len(list(program.graph.find_nodes(op="placeholder")))
        for index, tensor in weights.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"weight_{index}", tensor)
            else:
                self.register_buffer(f"weight_{index}", tensor)
        self.places = tuple(weights)

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        return self.program(*[self._argument(index, given) for index in range(self.count)])

    def _argument(self, index: int, given: Iterator[Tensor]) -> Any:
        if index in self.places:
            return getattr(self, f"weight_{index}")
        return self.numbers[index] if index in self.numbers else next(given)


def backend(program: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any) -> Compiled:
    """Compile what torch.compile captured; one artifact per combination of input shapes, made when it is first seen.

    Args:
        program: torch.compile's graph.
        example_inputs: its arguments: weights, tensors, and sizes.
        options: `target` (required) and any other option of `qcompile.compile` that concerns passes.

    Raises:
        QCompileError: without a target, or inside a training step.
    """
    settings = {"instruction_sets": "here", **(options or {})}  # what is compiled here is never shipped
    if "target" not in settings:
        raise QCompileError(
            'torch.compile: expected options={"target": "cpu-int4"} or another target, got none; `qcompile targets` lists them'
        )
    weights = {index: value for index, value in enumerate(example_inputs) if _is_weight(value)}
    made: dict[tuple[Any, ...], Compiled] = {}

    def run(*arguments: Any) -> Any:
        shapes = tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in arguments)
        if shapes not in made:
            made[shapes] = _compile(program, weights, arguments, settings)
        return made[shapes](*arguments)

    return run


def _is_weight(value: Any) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None)


def _compile(program: fx.GraphModule, weights: Mapping[int, Tensor], arguments: Sequence[Any], settings: dict[str, Any]) -> Compiled:
    from qcompile.compiler import compile as compile_model

    fixed = dict(weights)
    tensors = [index for index, value in enumerate(arguments) if isinstance(value, Tensor) and index not in fixed]
    numbers = {index: value for index, value in enumerate(arguments) if not isinstance(value, Tensor)}
    if any(arguments[index].requires_grad for index in tensors) and torch.is_grad_enabled():
        raise QCompileError(
            "torch.compile: expected a forward pass for inference, got inputs that need gradients; wrap the call in torch.no_grad()"
        )
    module = _Bound(program, fixed, numbers)
    inputs = tuple(arguments[index].detach().contiguous() for index in tensors)
    compiled = compile_model(module, example_inputs=inputs, dynamic_shapes={}, **settings)

    def run(*given: Any) -> Any:
        return compiled(*(given[index].detach() for index in tensors))

    return run
