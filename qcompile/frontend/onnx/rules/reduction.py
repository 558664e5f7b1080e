"""Over some axes: sums, means, extremes, norms, and where the extremes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


_FUNCTIONS: dict[str, Reduce] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


@rule(*_FUNCTIONS)
def reduce(node: Node) -> Tensor:
    """Over the axes told, else over all (or none, with `noop_with_empty_axes`)."""
    x, axes, keep = node.tensor(0), node.axes(), node.flag("keepdims", True)
    if not axes:
        if node.flag("noop_with_empty_axes"):
            return _on_each(node.operator, x)
        axes = list(range(x.dim()))
    node.ignore("noop_with_empty_axes")
    if not x.dim():
        return _on_each(node.operator, x)
    # The last axis is written -1, as patterns of norms have it.
    wanted = [-1 if axis % x.dim() == x.dim() - 1 else axis % x.dim() for axis in axes]
    if node.operator in ("ReduceMax", "ReduceMin") and any(x.shape[axis] == 0 for axis in wanted if isinstance(x.shape[axis], int)):
        return _extreme_of_nothing(node.operator, x, wanted, keep)
    result = _FUNCTIONS[node.operator](x, wanted, keep)
    return result if result.dtype == x.dtype else result.to(x.dtype)


def _extreme_of_nothing(operator: str, x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """The smallest value there is as the largest of nothing, and the other way round."""
    sign = -1 if operator == "ReduceMax" else 1
    if x.dtype.is_floating_point:
        value: Any = sign * torch.inf
    else:
        value = sign > 0 if x.dtype == torch.bool else torch.iinfo(x.dtype).max if sign > 0 else torch.iinfo(x.dtype).min
    gone = {axis % x.dim() for axis in axes}
    sizes = [1 if axis in gone else size for axis, size in enumerate(x.shape) if keep or axis not in gone]
    return torch.full(sizes, value, dtype=x.dtype)


def _on_each(operator: str, x: Tensor) -> Tensor:
    """What a reduction makes of a single element."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceSumSquare": torch.square, "ReduceLogSum": torch.log,
    }  # fmt: skip
    return functions[operator](x) if operator in functions else x


@rule("ArgMax", "ArgMin")
def extreme_place(node: Node) -> Any:
    """Where the largest or smallest is: the first of equal ones, or the last."""
    x = node.tensor(0)
    axis, keep = node.integer("axis", 0) % x.dim(), node.flag("keepdims", True)
    function = torch.argmax if node.operator == "ArgMax" else torch.argmin
    if node.flag("select_last_index"):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)
    return function(x, axis, keep)
