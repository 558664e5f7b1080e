"""Sequences of tensors whose length is known: Python lists while tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import Numbers, RefusalError, numbers_of


def _items(node: Node, index: int = 0) -> list[Any]:
    found = node.value(index)
    if not isinstance(found, list):
        raise RefusalError(f"expected input {index} to be a sequence, got a tensor")
    return found


@rule("SequenceConstruct")
def construct(node: Node) -> list[Tensor]:
    """Of tensors."""
    return node.tensors()


@rule("SequenceEmpty")
def empty(node: Node) -> list[Tensor]:
    """Of nothing."""
    node.ignore("dtype")
    return []


@rule("SequenceAt")
def at(node: Node) -> Any:
    """One element."""
    return _items(node)[int(node.number(1, "the position"))]


@rule("SequenceLength")
def length(node: Node) -> Numbers:
    """Number of elements."""
    return numbers_of([len(_items(node))], shape=[])


@rule("SequenceInsert")
def insert(node: Node) -> list[Any]:
    """With one more element, by default at the end."""
    items = list(_items(node))
    items.insert(int(node.number(2, "the position")) if node.has(2) else len(items), node.tensor(1))
    return items


@rule("SequenceErase")
def erase(node: Node) -> list[Any]:
    """Without one element, by default the last."""
    items = list(_items(node))
    del items[int(node.number(1, "the position")) if node.has(1) else -1]
    return items


@rule("ConcatFromSequence")
def concat(node: Node) -> Tensor:
    """All elements along an axis, or along a new one."""
    axis, items = int(node.required("axis")), _items(node)
    return torch.stack(items, axis) if node.flag("new_axis") else torch.cat(items, axis)


@rule("SplitToSequence")
def split(node: Node) -> list[Tensor]:
    """Parts along an axis; without sizes one element each."""
    x = node.tensor(0)
    axis, keep = node.integer("axis", 0) % x.dim(), node.flag("keepdims", True)
    if not node.has(1):
        return list(torch.split(x, 1, axis) if keep else x.unbind(axis))
    told = node.numbers(1, "the sizes")
    sizes: Any = int(told.flat[0]) if told.array.ndim == 0 else [int(item) for item in told.flat]
    return list(torch.split(x, sizes, axis))
