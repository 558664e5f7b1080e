"""Writing elements into a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.rules.indexing import index_tuple, positive
from qcompile.frontend.onnx.values import RefusalError

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _reduction(node: Node) -> str | None:
    told = node.text("reduction", "none")
    if told != "none" and told not in _REDUCTIONS:
        raise RefusalError(f"expected a reduction among none, {', '.join(_REDUCTIONS)}, got {told}")
    return _REDUCTIONS.get(told)


@rule("ScatterElements", "Scatter")
def scatter_elements(node: Node) -> Tensor:
    """Element by element along one axis."""
    x, updates, reduction = node.tensor(0), node.tensor(2), _reduction(node)
    axis = node.integer("axis", 0) % x.dim()
    places = positive(node, 1, x.shape[axis]).to(torch.int64)
    if reduction is None:
        return x.scatter(axis, places, updates)
    return x.scatter_add(axis, places, updates) if reduction == "sum" else x.scatter_reduce(axis, places, updates, reduction)


@rule("ScatterND")
def scatter_nd(node: Node) -> Tensor:
    """Slices, by tuples of indices."""
    x, indices, updates, reduction = node.tensor(0), node.tensor(1).to(torch.int64), node.tensor(2), _reduction(node)
    if reduction in (None, "sum"):
        return torch.index_put(x, index_tuple(x, indices), updates, accumulate=reduction is not None)
    count = indices.shape[-1]
    sizes = x.shape[:count]
    line = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis, size in enumerate(sizes):
        place = indices[..., axis]
        line = line * size + torch.where(place < 0, place + size, place)
    flat = x.reshape(sizes.numel(), -1)
    rows = line.reshape(-1, 1).expand(-1, flat.shape[1])
    return flat.scatter_reduce(0, rows, updates.reshape(-1, flat.shape[1]), str(reduction)).reshape(x.shape)


@rule("TensorScatter")
def tensor_scatter(node: Node) -> Tensor:
    """New keys or values into a cache, from a place per sequence on."""
    cache, update = node.tensor(0), node.tensor(1)
    axis = node.integer("axis", -2) % cache.dim()
    length = cache.shape[axis]
    start = node.tensor(2) if node.has(2) else torch.zeros(cache.shape[0], dtype=torch.int64)
    places = start.unsqueeze(1) + torch.arange(update.shape[axis])
    if node.text("mode", "linear") == "circular":
        places = torch.remainder(places, length)
    rows = torch.arange(cache.shape[0]).unsqueeze(1)
    moved = torch.index_put(cache.movedim(axis, 1), (rows, places), update.movedim(axis, 1))
    return moved.movedim(1, axis)
