"""Convolutions, pooling and resizing of images [B, C, ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument, static
from qcompile.exporters.onnx.rules.table import rule


def spread(value: Any, rank: int) -> list[int]:
    """One number for all axes, or one for each."""
    if isinstance(value, int):
        return [value] * rank
    return list(value) * (rank if len(value) == 1 else 1)


def window(stride: Any, padding: Any, dilation: Any, rank: int) -> dict[str, Any]:
    """Attributes of what slides over an image."""
    pads = spread(padding, rank)
    return {"strides": spread(stride, rank), "pads": [*pads, *pads], "dilations": spread(dilation, rank)}


@rule("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv2d.padding")
def convolution(e: Emitter, node: Call) -> Value:
    """Weights [N, C / groups, ...]."""
    rank = len(e.shape(node)) - 2
    padding = argument(node, 4, "padding", 0)
    dilation = spread(argument(node, 5, "dilation", 1), rank)
    options = window(argument(node, 3, "stride", 1), 0 if isinstance(padding, str) else padding, dilation, rank)
    kernel = e.shape(node.args[1])[2:]
    if padding == "same":
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        options["pads"] = [*(size // 2 for size in total), *(size - size // 2 for size in total)]
    x, weight = e.value(node.args[0]), e.value(node.args[1])
    groups = int(argument(node, 6, "groups", 1))
    return e.op("Conv", x, weight, e.optional(argument(node, 2, "bias")), kernel_shape=kernel, group=groups, **options)


@rule("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.avg_pool2d.default")
def pool(e: Emitter, node: Call) -> Value:
    """The largest, or the mean, of each window."""
    name, rank = str(node.target), len(e.shape(node)) - 2
    kernel = spread(node.args[1], rank)
    asked = argument(node, 2, "stride", None)
    stride, padding = asked if asked not in (None, [], ()) else kernel, argument(node, 3, "padding", 0)
    if "max" in name:
        options = window(stride, padding, argument(node, 4, "dilation", 1), rank)
        return e.op("MaxPool", e.value(node.args[0]), kernel_shape=kernel, ceil_mode=int(argument(node, 5, "ceil_mode", False)), **options)
    if argument(node, 6, "divisor_override", None) is not None:
        raise e.refusal("expected the mean of a window, got a divisor of its own")
    options = window(stride, padding, 1, rank)
    del options["dilations"]
    flags: dict[str, Any] = {
        "ceil_mode": int(argument(node, 4, "ceil_mode", False)),
        "count_include_pad": int(argument(node, 5, "count_include_pad", True)),
    }
    return e.op("AveragePool", e.value(node.args[0]), kernel_shape=kernel, **options, **flags)


@rule("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default")
def adaptive_pool(e: Emitter, node: Call) -> Value:
    """Means of as many windows as are asked for: all at once, or windows of one size."""
    asked: Any = node.args[1]
    rank = len(asked)
    if all(isinstance(size, int) and size == 1 for size in asked):
        return e.op("ReduceMean", e.value(node.args[0]), e.ints(range(-rank, 0)), keepdims=1)
    sizes = e.shape(node.args[0])[-rank:]
    if not static(sizes) or any(size % out for size, out in zip(sizes, asked, strict=True)):
        raise e.refusal(f"expected known sizes that {asked} divides, got {sizes}")
    kernel = [size // out for size, out in zip(sizes, asked, strict=True)]
    return e.op("AveragePool", e.value(node.args[0]), kernel_shape=kernel, strides=kernel)


@rule("aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec")
def upsample(e: Emitter, node: Call) -> Value:
    """Images of another size, as torch counts pixels."""
    linear = "bilinear" in str(node.target)
    asked: Any = node.args[1]
    factors: Sequence[float] | None = argument(node, 3 if linear else 2, "scale_factors", None)
    aligned = bool(linear and argument(node, 2, "align_corners", False))
    kind = "align_corners" if aligned else "half_pixel" if linear else "asymmetric"
    options = {"mode": "linear" if linear else "nearest", "coordinate_transformation_mode": kind}
    if not linear:
        options["nearest_mode"] = "floor"
    x = e.value(node.args[0])
    if asked is None:
        return e.op("Resize", x, None, e.constant([1.0, 1.0, *(factors or ())]), **options)
    sizes = e.op("Concat", e.op("Shape", x, start=0, end=2), e.sizes(asked), axis=0)
    return e.op("Resize", x, None, None, sizes, **options)
