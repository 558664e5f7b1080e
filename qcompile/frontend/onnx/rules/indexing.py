"""Choosing elements: gathers, the largest, running sums, one-hot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import MOST_NUMBERS, Held, Numbers, RefusalError, is_symbolic


def positive(node: Node, index: int, size: Any) -> Tensor:
    """Indices as int64, those from the end counted from the start; constants that have none are left alone."""
    value, found = node.value(index), node.tensor(index)
    if found.dtype == torch.uint8:
        found = found.to(torch.int64)
    if isinstance(value, Held | Numbers) and found.numel() <= MOST_NUMBERS:
        items = node.elements(index)
        if not any(is_symbolic(item) or item < 0 for item in items):
            return found
    return torch.where(found < 0, found + size, found)


@rule("Gather")
def gather(node: Node) -> Tensor:
    """Along one axis; rows of a weight matrix are an embedding."""
    x = node.tensor(0)
    axis = node.integer("axis", 0) % x.dim()
    value, indices = node.value(1), node.tensor(1)
    if isinstance(value, Held | Numbers) and indices.dim() == 0:
        return x.select(axis, node.number(1))
    if axis == 0 and x.dim() == 2 and isinstance(node.value(0), Held) and x.dtype.is_floating_point and not isinstance(value, Held):
        return F.embedding(indices, x)
    places = positive(node, 1, x.shape[axis])
    if indices.dim() == 1:
        return x.index_select(axis, places)
    picked = x.index_select(axis, places.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@rule("GatherElements")
def gather_elements(node: Node) -> Tensor:
    """Element by element along one axis."""
    x = node.tensor(0)
    axis = node.integer("axis", 0) % x.dim()
    return torch.gather(x, axis, positive(node, 1, x.shape[axis]).to(torch.int64))


@rule("GatherND")
def gather_nd(node: Node) -> Tensor:
    """By tuples of indices in the last dimension, after `batch_dims` dimensions in common."""
    x, indices, batch = node.tensor(0), node.tensor(1).to(torch.int64), node.integer("batch_dims", 0)
    return x[index_tuple(x, indices, batch)]


def index_tuple(x: Tensor, indices: Tensor, batch: int = 0) -> tuple[Tensor, ...]:
    """Tuples in the last dimension of `indices` as one index tensor per dimension of `x`."""
    places = list(indices.unbind(-1))
    for axis in range(batch):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = -1
        places.insert(axis, torch.arange(x.shape[axis]).reshape(shape))
    return tuple(places)


@rule("OneHot")
def one_hot(node: Node) -> Tensor:
    """The on-value where the index points, the off-value elsewhere and for indices out of range."""
    indices, depth, values = node.tensor(0), int(node.number(1, "the depth")), node.tensor(2)
    axis = node.integer("axis", -1)
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    indices = torch.where(indices < 0, indices + depth, indices)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = depth
    return torch.where(indices.unsqueeze(axis) == torch.arange(depth).reshape(shape), values[1], values[0])


@rule("TopK")
def top_k(node: Node) -> tuple[Tensor, Tensor]:
    """The largest or smallest; of equal ones the first."""
    x = node.tensor(0)
    count = node.attribute("k")
    count = node.number(1, "k") if count is None else int(count)
    axis = node.integer("axis", -1) % x.dim()
    node.ignore("sorted")
    values, places = torch.sort(x, dim=axis, descending=node.flag("largest", True), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@rule("CumSum", "CumProd")
def running(node: Node) -> Tensor:
    """Running sums or products, from either end, with or without the element itself."""
    x = node.tensor(0)
    axis = int(node.number(1, "the axis")) % x.dim()
    backwards = node.flag("reverse")
    x = x.flip(axis) if backwards else x
    function = torch.cumsum if node.operator == "CumSum" else torch.cumprod
    if node.flag("exclusive"):
        first = torch.full_like(x.narrow(axis, 0, 1), 0 if node.operator == "CumSum" else 1)
        x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    total = function(x, axis, dtype=x.dtype)
    return total.flip(axis) if backwards else total


@rule("ReverseSequence")
def reverse_sequence(node: Node) -> Tensor:
    """The first elements of each sequence in reverse."""
    x, lengths = node.tensor(0), node.tensor(1)
    batch, time = node.integer("batch_axis", 1), node.integer("time_axis", 0)
    steps = torch.arange(x.shape[time]).unsqueeze(0)
    places = torch.where(steps < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - steps, steps)
    places = (places if batch < time else places.t()).reshape(*places.shape if batch < time else places.t().shape, *[1] * (x.dim() - 2))
    if {batch, time} != {0, 1}:
        raise RefusalError(f"expected batch and time in the first two dimensions, got {batch} and {time}")
    return torch.gather(x, time, places.expand(x.shape))
