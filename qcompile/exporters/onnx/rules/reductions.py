"""Sums, means and extremes along axes."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument, axis_of
from qcompile.exporters.onnx.rules.table import rule

_NAMES = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "logsumexp": "ReduceLogSumExp"}


def _axes(e: Emitter, node: Call, asked: Any) -> Value | None:
    """As `ints`; None is all of them."""
    if asked is None or asked == []:
        return None
    rank = len(e.shape(node.args[0]))
    return e.ints([axis_of(axis, rank) for axis in ([asked] if isinstance(asked, int) else asked)])


@rule(
    "aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim", "aten.amax.default", "aten.amin.default",
    "aten.logsumexp.default",
)  # fmt: skip
def reduce(e: Emitter, node: Call) -> Value:
    """Over some axes or all."""
    name = str(node.target).removeprefix("aten.").split(".")[0]
    whole = str(node.target) in ("aten.sum.default", "aten.mean.default")
    keep = 0 if whole else int(argument(node, 2, "keepdim", False))
    axes = None if whole else _axes(e, node, argument(node, 1, "dim"))
    return e.op(_NAMES[name], e.value(node.args[0], e.dtype(node)), axes, keepdims=keep)


@rule("aten.max.default", "aten.min.default")
def extreme(e: Emitter, node: Call) -> Value:
    """Of everything."""
    return e.op("ReduceMax" if "max" in str(node.target) else "ReduceMin", e.value(node.args[0]), keepdims=0)


@rule("aten.max.dim", "aten.min.dim")
def extreme_along(e: Emitter, node: Call) -> tuple[Value, Value]:
    """Of an axis, and where it stands first."""
    kind = "Max" if "max" in str(node.target) else "Min"
    axis, keep = axis_of(int(node.args[1]), len(e.shape(node.args[0]))), int(argument(node, 2, "keepdim", False))
    x = e.value(node.args[0])
    return e.op(f"Reduce{kind}", x, e.ints([axis]), keepdims=keep), e.op(f"Arg{kind}", x, axis=axis, keepdims=keep)


@rule("aten.argmax.default", "aten.argmin.default")
def place(e: Emitter, node: Call) -> Value:
    """Where the extreme of an axis stands first."""
    asked, name = argument(node, 1, "dim"), "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    if asked is None:
        return e.op("Squeeze", e.op(name, e.reshape(e.value(node.args[0]), [-1]), axis=0, keepdims=1), e.ints([0]))
    axis = axis_of(asked, len(e.shape(node.args[0])))
    return e.op(name, e.value(node.args[0]), axis=axis, keepdims=int(argument(node, 2, "keepdim", False)))


@rule("aten.any.default", "aten.any.dim", "aten.all.default", "aten.all.dim")
def truth(e: Emitter, node: Call) -> Value:
    """Whether any, or all, are true."""
    name, whole = str(node.target), str(node.target).endswith("default")
    numbers = e.cast(e.value(node.args[0], torch.bool), torch.int32)
    axes = None if whole else _axes(e, node, argument(node, 1, "dim"))
    keep = 0 if whole else int(argument(node, 2, "keepdim", False))
    return e.cast(e.op("ReduceMax" if "any" in name else "ReduceMin", numbers, axes, keepdims=keep), torch.bool)


@rule("aten.softmax.int", "aten.log_softmax.int")
def softmax(e: Emitter, node: Call) -> Value:
    """Weights of an axis, or their logarithms."""
    name = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    axis = axis_of(int(node.args[1]), len(e.shape(node)))
    return e.op(name, e.value(node.args[0], e.dtype(node)), axis=axis)


@rule("aten.var.correction", "aten.var.dim")
def variance(e: Emitter, node: Call) -> Value:
    """Mean square distance from the mean; the divisor is the count less the correction."""
    x: Any = node.args[0]
    correction = argument(node, 2, "unbiased", True) if "dim" in str(node.target) else node.kwargs.get("correction", 1)
    shape, asked = e.shape(x), argument(node, 1, "dim")
    axes = list(range(len(shape))) if asked is None else [axis_of(axis, len(shape)) for axis in asked]
    count = 1
    for axis in axes:
        if not isinstance(shape[axis], int):
            raise e.refusal("expected axes of known sizes")
        count *= shape[axis]
    value = e.value(x)
    centred = e.op("Sub", value, e.op("ReduceMean", value, e.ints(axes), keepdims=1))
    mean = e.op("ReduceMean", e.op("Mul", centred, centred), e.ints(axes), keepdims=int(node.kwargs.get("keepdim", False)))
    factor = count / (count - int(1 if correction is None else correction))
    return e.op("Mul", mean, e.constant(factor, e.dtype(node)))
