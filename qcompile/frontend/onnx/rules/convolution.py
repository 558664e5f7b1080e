"""Convolutions in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError, is_symbolic

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Window:
    """How a kernel moves: per spatial axis its size, step and spacing, and what is padded before and after."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[Any]
    after: list[Any]

    @property
    def span(self) -> list[int]:
        """Elements from the first to the last tap."""
        return [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]

    @property
    def symmetric(self) -> bool:
        """Whether as much is padded before as after."""
        return not any(map(is_symbolic, (*self.before, *self.after))) and self.before == self.after


def window(node: Node, sizes: Sequence[Any], kernel: Sequence[int]) -> Window:
    """The window of a node over spatial `sizes`, whichever way its padding is written."""
    dims = len(sizes)
    told = node.integers("kernel_shape") or list(kernel)
    strides, dilations = node.integers("strides") or [1] * dims, node.integers("dilations") or [1] * dims
    auto, pads = node.text("auto_pad", "NOTSET"), node.integers("pads") or [0] * (2 * dims)
    if auto == "NOTSET":
        return Window(told, strides, dilations, pads[:dims], pads[dims:])
    if auto == "VALID":
        return Window(told, strides, dilations, [0] * dims, [0] * dims)
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise RefusalError(f"expected auto_pad NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {auto}")
    before, after = [], []
    for size, count, step, spacing in zip(sizes, told, strides, dilations, strict=True):
        span = (count - 1) * spacing + 1
        total = span - 1 if step == 1 else _at_least_0(((size + step - 1) // step - 1) * step + span - size)
        small = total // 2
        before.append(small if auto == "SAME_UPPER" else total - small)
        after.append(total - before[-1])
    return Window(told, strides, dilations, before, after)


def _at_least_0(total: Any) -> Any:
    return torch.sym_max(total, 0) if is_symbolic(total) else max(total, 0)  # type: ignore[no-untyped-call]


def padded(x: Tensor, before: Sequence[Any], after: Sequence[Any], value: float = 0.0) -> Tensor:
    """X [N, C, ...] with its spatial axes padded (or cut, where negative)."""
    flat = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
    return F.pad(x, flat, value=value) if any(is_symbolic(amount) or amount for amount in flat) else x


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, moved: Window, groups: int) -> Tensor:
    """X [N, C, ...] with weight [O, C / groups, ...]."""
    dims = weight.dim() - 2
    if dims not in _CONV:
        raise RefusalError(f"expected 1 to 3 spatial dimensions, got {dims}")
    if moved.symmetric and min(moved.before, default=0) >= 0:
        return _CONV[dims](x, weight, bias, moved.strides, moved.before, moved.dilations, groups)
    return _CONV[dims](padded(x, moved.before, moved.after), weight, bias, moved.strides, 0, moved.dilations, groups)


@rule("Conv")
def conv(node: Node) -> Tensor:
    """With padding before and after, spacing and groups."""
    x, weight = node.tensor(0), node.tensor(1)
    return convolve(x, weight, node.optional(2), window(node, x.shape[2:], weight.shape[2:]), node.integer("group", 1))


@rule("ConvTranspose")
def conv_transpose(node: Node) -> Tensor:
    """The gradient of a convolution; its output size is told by padding or by itself."""
    x, weight, bias = node.tensor(0), node.tensor(1), node.optional(2)
    dims, groups = weight.dim() - 2, node.integer("group", 1)
    strides, dilations = node.integers("strides") or [1] * dims, node.integers("dilations") or [1] * dims
    kernel = node.integers("kernel_shape") or list(weight.shape[2:])
    extra = node.integers("output_padding") or [0] * dims
    span = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    before, after = _transposed_padding(node, x.shape[2:], strides, span, extra)
    plain = before == after and min(before) >= 0 and all(a < s for a, s in zip(extra, strides, strict=True))
    if plain:
        return _TRANSPOSED[dims](x, weight, bias, strides, before, extra, groups, dilations)
    whole = _TRANSPOSED[dims](x, weight, None, strides, 0, 0, groups, dilations)
    result = padded(whole, [-low for low in before], [more - high for more, high in zip(extra, after, strict=True)])
    return result if bias is None else result + bias.reshape(-1, *[1] * dims)


def _transposed_padding(
    node: Node, sizes: Sequence[Any], strides: list[int], span: list[int], extra: list[int]
) -> tuple[list[Any], list[Any]]:
    dims, auto = len(strides), node.text("auto_pad", "NOTSET")
    told, pads = node.integers("output_shape"), node.integers("pads") or [0] * (2 * dims)
    if told is None and auto in ("NOTSET", "VALID"):
        return (pads[:dims], pads[dims:]) if auto == "NOTSET" else ([0] * dims, [0] * dims)
    wanted = [size * step for size, step in zip(sizes, strides, strict=True)] if told is None else told[-dims:]
    before, after = [], []
    for size, step, wide, more, out in zip(sizes, strides, span, extra, wanted, strict=True):
        # The size of the input cancels out where the output is to be its multiple.
        total = wide - step + more if told is None else step * (size - 1) + more + wide - out
        small = total // 2
        before.append(small if auto == "SAME_UPPER" else total - small)
        after.append(total - before[-1])
    return before, after


@rule("ConvInteger")
def conv_integer(node: Node) -> Tensor:
    """Of 8-bit integers, exact in float64, in int32."""
    x, weight = (node.tensor(index).to(torch.float64) for index in (0, 1))
    x = x - node.tensor(2).to(torch.float64) if node.has(2) else x
    if node.has(3):
        zero = node.tensor(3).to(torch.float64)
        weight = weight - (zero.reshape(-1, *[1] * (weight.dim() - 1)) if zero.dim() == 1 else zero)
    moved = window(node, x.shape[2:], weight.shape[2:])
    return convolve(x, weight, None, moved, node.integer("group", 1)).to(torch.int32)
