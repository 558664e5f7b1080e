"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.exporters.onnx.emitter import MICROSOFT, Call, Emitter, Value, argument
from qcompile.exporters.onnx.rules.table import rule

_RMS_OPSET = 23
"""Since which RMSNormalization is a standard operator."""


@rule("qcompile.rms_norm.default")
def rms_norm(e: Emitter, node: Call) -> Value:
    """Over the last axis."""
    x, weight, eps = node.args[:3]
    return normalized(e, e.value(x), weight, float(eps), float(argument(node, 3, "offset", 0.0)), node.args[0])


def normalized(e: Emitter, x: Value, weight: Any, eps: float, offset: float, like: Any) -> Value:
    """X over its root mean square, times what the gain and its offset make; computed in float32 at least."""
    val = like.meta["val"]
    dtype, size = val.dtype, int(val.shape[-1])
    wide = torch.promote_types(dtype, torch.float32)
    gain = _gain(e, weight, offset, size, wide)
    if dtype == wide and e.opset >= _RMS_OPSET:
        return e.op("RMSNormalization", x, gain, axis=-1, epsilon=eps)
    wider = x if dtype == wide else e.cast(x, wide)
    mean = e.op("ReduceMean", e.op("Mul", wider, wider), e.ints([-1]), keepdims=1)
    root = e.op("Sqrt", e.op("Add", mean, e.constant(eps, wide)))
    made = e.op("Mul", e.op("Div", wider, root), gain)
    return made if dtype == wide else e.cast(made, dtype)


def _gain(e: Emitter, weight: Any, offset: float, size: int, dtype: torch.dtype) -> Value:
    if weight is None:
        return e.constant(torch.ones(size, dtype=dtype))
    if offset == 0 and e.dtype(weight) == dtype:
        return e.value(weight)

    def change(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) + offset

    return e.from_constant(weight, "gain", dtype, (size,), change)


@rule("qcompile.add_rms_norm.default")
def add_rms_norm(e: Emitter, node: Call) -> tuple[Value, Value]:
    """The sum, and that normalized."""
    x, residual, weight, eps = node.args[:4]
    offset = float(argument(node, 4, "offset", 0.0))
    if e.is_ort and e.dtype(x) == torch.float32:
        gain = _gain(e, weight, offset, int(e.shape(x)[-1]), torch.float32)
        parts = e.ops(
            "SkipSimplifiedLayerNormalization", e.value(x), e.value(residual), gain, domain=MICROSOFT, count=4, epsilon=float(eps)
        )
        parts[1].name = parts[2].name = ""  # statistics, for training
        return parts[3], parts[0]
    total = e.op("Add", e.value(x), e.value(residual))
    return total, normalized(e, total, weight, float(eps), offset, x)


@rule("aten.rms_norm.default")
def torch_rms_norm(e: Emitter, node: Call) -> Value:
    """Over the last axes; of one only."""
    x, sizes = node.args[0], node.args[1]
    if len(sizes) != 1:
        raise e.refusal("expected the last axis only")
    eps = argument(node, 3, "eps", None)
    small = torch.finfo(e.dtype(node)).eps if eps is None else float(eps)
    return normalized(e, e.value(x), argument(node, 2, "weight", None), small, 0.0, x)


@rule("aten.layer_norm.default")
def layer_norm(e: Emitter, node: Call) -> Value:
    """Over the last axes."""
    x, sizes = node.args[:2]
    dtype, shape = e.dtype(node), [int(size) for size in sizes]
    weight, bias = (argument(node, place, name, None) for place, name in ((2, "weight"), (3, "bias")))
    gain = e.constant(torch.ones(shape, dtype=dtype)) if weight is None else e.value(weight, dtype)
    return e.op(
        "LayerNormalization", e.value(x), gain, e.optional(bias, dtype), axis=-len(shape), epsilon=float(argument(node, 4, "eps", 1e-5))
    )


@rule("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(e: Emitter, node: Call) -> Any:
    """Of images, by statistics that are constants."""
    legit = "legit" in str(node.target)
    x, weight, bias, mean, variance = node.args[:5]
    if not legit and argument(node, 5, "training", False):
        raise e.refusal("expected inference, got training")
    if mean is None or variance is None:
        raise e.refusal("expected running statistics, got none")
    size = int(mean.meta["val"].shape[0])
    dtype = e.dtype(x)
    gain = e.constant(torch.ones(size, dtype=dtype)) if weight is None else e.value(weight)
    shift = e.constant(torch.zeros(size, dtype=dtype)) if bias is None else e.value(bias)
    eps = float(argument(node, 6 if legit else 7, "eps", 1e-5))
    made = e.op("BatchNormalization", e.value(x), gain, shift, e.value(mean), e.value(variance), epsilon=eps)
    return (made, None, None) if legit else made


@rule("aten.group_norm.default", "aten.instance_norm.default")
def group_norm(e: Emitter, node: Call) -> Value:
    """Over the channels of a group and all that follows."""
    x: Any = node.args[0]
    dtype, shape = e.dtype(node), e.shape(x)
    channels, instance = int(shape[1]), "instance" in str(node.target)
    weight, bias = (
        argument(node, place, name, None) for place, name in (((1, "weight"), (2, "bias")) if instance else ((2, "weight"), (3, "bias")))
    )
    groups = channels if instance else int(node.args[1])
    eps = float(argument(node, 7 if instance else 4, "eps", 1e-5))
    value = e.value(x)
    flat = e.op("Reshape", value, e.ints([0, groups, -1]))
    ones, zeros = e.constant(torch.ones(groups, dtype=dtype)), e.constant(torch.zeros(groups, dtype=dtype))
    made = e.op("Reshape", e.op("InstanceNormalization", flat, ones, zeros, epsilon=eps), e.op("Shape", value))
    behind = [-1, *[1] * (len(shape) - 2)]
    if weight is not None:
        made = e.op("Mul", made, e.reshape(e.value(weight), behind))
    return made if bias is None else e.op("Add", made, e.reshape(e.value(bias), behind))
