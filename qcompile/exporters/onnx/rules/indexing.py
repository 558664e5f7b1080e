"""Parts of tensors by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument, axis_of
from qcompile.exporters.onnx.rules.table import rule


@rule("aten.embedding.default")
def embedding(e: Emitter, node: Call) -> Value:
    """Rows of a table."""
    return e.op("Gather", e.value(node.args[0]), e.value(node.args[1]), axis=0)


@rule("aten.index_select.default", "aten.select.int")
def index_select(e: Emitter, node: Call) -> Value:
    """Entries of an axis; one number takes the axis away."""
    axis = axis_of(int(node.args[1]), len(e.shape(node.args[0])))
    return e.op("Gather", e.value(node.args[0]), e.value(node.args[2], torch.int64), axis=axis)


@rule("aten.gather.default")
def gather(e: Emitter, node: Call) -> Value:
    """Entries of an axis, one for each place."""
    axis = axis_of(int(node.args[1]), len(e.shape(node.args[0])))
    return e.op("GatherElements", e.value(node.args[0]), e.value(node.args[2], torch.int64), axis=axis)


@rule("aten.slice.Tensor", "aten.narrow.default")
def cut(e: Emitter, node: Call) -> Value:
    """A part of an axis."""
    x: Any = node.args[0]
    axis = axis_of(argument(node, 1, "dim", 0), len(e.shape(x)))
    start, end, step = argument(node, 2, "start", 0), argument(node, 3, "end", None), argument(node, 4, "step", 1)
    if "narrow" in str(node.target):
        if not (isinstance(start, int) and isinstance(end, int)):
            raise e.refusal("expected a known start and length")
        start, end, step = start, start + end, 1
    first = 0 if start is None else start
    return e.slice(e.value(x), axis, first, step=step) if end is None else e.slice(e.value(x), axis, first, end, step)


@rule("aten.index.Tensor")
def index(e: Emitter, node: Call) -> Value:
    """By one list of numbers, or by several for axes side by side at the front."""
    x, lists = node.args[0], list(node.args[1])
    places = [place for place, item in enumerate(lists) if item is not None]
    if any(e.dtype(lists[place]) in (torch.bool, torch.uint8) for place in places):
        raise e.refusal("expected numbers, got a mask, whose result has a size that depends on it")
    if len(places) == 1:
        return e.op("Gather", e.value(x), e.value(lists[places[0]], torch.int64), axis=places[0])
    if places != list(range(len(places))):
        raise e.refusal("expected lists of numbers for axes side by side at the front")
    first, *others = (e.value(lists[place], torch.int64) for place in places)
    total = first
    for other in others:  # the common shape
        total = e.op("Add", total, other)
    shape = e.op("Shape", total)
    last = [e.op("Unsqueeze", e.op("Expand", value, shape), e.ints([-1])) for value in (first, *others)]
    return e.op("GatherND", e.value(x), e.op("Concat", *last, axis=-1))


@rule("qcompile.gather_last.default")
def gather_last(e: Emitter, node: Call) -> Value:
    """The row of each sequence's greatest position: x [B, S, K] -> [B, 1, K]."""
    last = e.op("ArgMax", e.value(node.args[1]), axis=1, keepdims=1)
    return e.op("GatherND", e.value(node.args[0]), e.op("Unsqueeze", last, e.ints([-1])), batch_dims=1)


@rule("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default")
def scatter(e: Emitter, node: Call) -> Value:
    """Numbers put at places of an axis, or added there."""
    x, axis, places, source = node.args[:4]
    dtype, index = e.dtype(node), e.value(places, torch.int64)
    numbers = e.value(source, dtype) if isinstance(source, fx.Node) else e.op("Expand", e.constant(source, dtype), e.op("Shape", index))
    kind = "add" if "add" in str(node.target) else "none"
    return e.op("ScatterElements", e.value(x), index, numbers, axis=axis_of(int(axis), len(e.shape(x))), reduction=kind)


@rule("aten.tril.default", "aten.triu.default")
def triangle(e: Emitter, node: Call) -> Value:
    """What lies below, or above, a diagonal."""
    diagonal = e.constant(int(argument(node, 1, "diagonal", 0)), torch.int64)
    return e.op("Trilu", e.value(node.args[0]), diagonal, upper=int("triu" in str(node.target)))


@rule("aten.cumsum.default")
def cumsum(e: Emitter, node: Call) -> Value:
    """Running sums."""
    axis = axis_of(int(node.args[1]), len(e.shape(node)))
    return e.op("CumSum", e.value(node.args[0], e.dtype(node)), e.constant(axis, torch.int64))


@rule("aten.topk.default")
def topk(e: Emitter, node: Call) -> tuple[Value, ...]:
    """The largest numbers of an axis and where they stand."""
    axis = axis_of(argument(node, 2, "dim", -1), len(e.shape(node.args[0])))
    options: dict[str, Any] = {"largest": int(argument(node, 3, "largest", True)), "sorted": 1}
    return e.ops("TopK", e.value(node.args[0]), e.size(node.args[1]), count=2, axis=axis, **options)


@rule("aten.one_hot.default")
def one_hot(e: Emitter, node: Call) -> Value:
    """1 at the place of each number."""
    count: Any = argument(node, 1, "num_classes", -1)
    if not isinstance(count, int) or count < 0:
        raise e.refusal("expected a known number of classes")
    return e.op("OneHot", e.value(node.args[0]), e.constant(count, torch.int64), e.constant([0, 1], e.dtype(node)), axis=-1)


@rule("aten.flip.default")
def flip(e: Emitter, node: Call) -> Value:
    """Axes backwards."""
    value, rank = e.value(node.args[0]), len(e.shape(node))
    for axis in node.args[1]:
        value = e.slice(value, axis_of(axis, rank), -1, -(1 << 63) + 1, step=-1)
    return value
