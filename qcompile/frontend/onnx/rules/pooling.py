"""Pooling: by the largest, by the mean, by a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.rules.convolution import _CONV, Window, padded, window
from qcompile.frontend.onnx.values import RefusalError, is_symbolic

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _moved(node: Node, x: Tensor) -> tuple[Window, list[Any]]:
    """The window, and what must be padded at the end in addition for `ceil_mode`."""
    dims = x.dim() - 2
    if dims not in _MAX:
        raise RefusalError(f"expected 1 to 3 spatial dimensions, got {dims}")
    moved = window(node, x.shape[2:], node.required("kernel_shape"))
    if not node.flag("ceil_mode") or node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return moved, [0] * dims
    return moved, [_more(size, *parts) for size, *parts in zip(
        x.shape[2:], moved.before, moved.after, moved.span, moved.strides, strict=True)]  # fmt: skip


def _more(size: Any, before: int, after: int, span: int, step: int) -> Any:
    """How far the last window, started inside the input or its left padding, reaches beyond the right padding."""
    if is_symbolic(size):
        raise RefusalError("expected ceil_mode=0 along an axis that varies, got ceil_mode=1")
    count = -(-(size + before + after - span) // step) + 1
    if (count - 1) * step >= size + before:
        count -= 1
    return max((count - 1) * step + span - (size + before + after), 0)


@rule("MaxPool")
def max_pool(node: Node) -> tuple[Any, ...]:
    """The largest of each window; places are not served."""
    x = node.tensor(0)
    node.ignore("storage_order")
    if node.wants(1):
        raise RefusalError("expected one output, got the places of the largest too")
    moved, more = _moved(node, x)
    function, wide = _MAX[x.dim() - 2], x if x.dtype.is_floating_point else x.to(torch.float32)
    narrow = moved.symmetric and not any(is_symbolic(item) or item for item in more)
    if narrow and all(2 * pad <= size for pad, size in zip(moved.before, moved.kernel, strict=True)):
        result = function(wide, moved.kernel, moved.strides, moved.before, moved.dilations)
    else:
        after = [pad + extra for pad, extra in zip(moved.after, more, strict=True)]
        wide = padded(wide, moved.before, after, -math.inf)
        result = function(wide, moved.kernel, moved.strides, 0, moved.dilations)
    return (result if result.dtype == x.dtype else result.to(x.dtype),)


@rule("AveragePool")
def average_pool(node: Node) -> Tensor:
    """The mean of each window; padding counts only if told so."""
    x, counted = node.tensor(0), node.flag("count_include_pad")
    moved, more = _moved(node, x)
    plain = moved.symmetric and not any(is_symbolic(item) or item for item in more) and set(moved.dilations) == {1}
    if plain and all(2 * pad <= size for pad, size in zip(moved.before, moved.kernel, strict=True)):
        pooled: Tensor = _MEAN[x.dim() - 2](x, moved.kernel, moved.strides, moved.before, False, counted)
        return pooled
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    if counted:
        ones = padded(ones, moved.before, moved.after, 1.0)
    return _sums(x, moved, more) / _sums(ones, moved, more, not counted)


def _sums(x: Tensor, moved: Window, more: Sequence[Any], pads: bool = True) -> Tensor:
    """The sum of each window: a convolution with ones, channel by channel."""
    dims = x.dim() - 2
    before = moved.before if pads else [0] * dims
    after = [pad + extra for pad, extra in zip(moved.after if pads else [0] * dims, more, strict=True)]
    wide = padded(x, before, after)
    kernel = torch.ones([1, 1, *moved.kernel], dtype=x.dtype)
    summed = _CONV[dims](wide.flatten(0, 1).unsqueeze(1), kernel, None, moved.strides, 0, moved.dilations)
    return summed.reshape(x.shape[0], x.shape[1], *summed.shape[2:])


@rule("LpPool")
def lp_pool(node: Node) -> Tensor:
    """The p-norm of each window."""
    x, power = node.tensor(0), node.integer("p", 2)
    moved, more = _moved(node, x)
    return _sums(x.abs().pow(power), moved, more).pow(1 / power)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: Node) -> Tensor:
    """Over all spatial axes, which stay with one element each."""
    x = node.tensor(0)
    axes = list(range(2, x.dim()))
    if node.operator == "GlobalLpPool":
        power = node.integer("p", 2)
        return x.abs().pow(power).sum(axes, keepdim=True).pow(1 / power)
    return x.mean(axes, keepdim=True) if node.operator == "GlobalAveragePool" else torch.amax(x, axes, keepdim=True)
