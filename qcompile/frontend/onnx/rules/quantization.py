"""Rounding to integers and small floats, and back; products of integers."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from qcompile.frontend.onnx.kinds import LARGEST, RANGES, kind_name
from qcompile.frontend.onnx.node import Node, dtype_of
from qcompile.frontend.onnx.registry import MICROSOFT, rule
from qcompile.frontend.onnx.rules.convolution import convolve, window
from qcompile.frontend.onnx.rules.shaping import to_float8
from qcompile.frontend.onnx.values import RefusalError


def spread(part: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point so that it broadcasts to x: one number, one per element of an axis, or one per block along it."""
    if part.dim() == 0 or (part.dim() == 1 and part.numel() == 1 and not block):
        return part.reshape([])
    axis = axis % x.dim()
    if part.dim() == 1 and not block:
        shape = [1] * x.dim()
        shape[axis] = -1
        return part.reshape(shape)
    if part.dim() != x.dim():
        raise RefusalError(f"expected a scale of {x.dim()} dimensions for blocks, got {part.dim()}")
    repeated = part.repeat_interleave(block or -(-x.shape[axis] // part.shape[axis]), axis)
    return repeated.narrow(axis, 0, x.shape[axis])


@rule("QuantizeLinear")
@rule("QuantizeLinear", domain=MICROSOFT)
def quantize(node: Node) -> Tensor:
    """saturate(round(x / scale) + zero point), ties to even."""
    x, scale = node.tensor(0), node.tensor(1)
    axis, block, saturate = node.integer("axis", 1), node.integer("block_size", 0), node.flag("saturate", True)
    told, precision = node.integer("output_dtype", 0), node.integer("precision", 0)
    kind = node.made = node.kind(2) if node.has(2) else told or TensorProto.UINT8
    if precision not in (0, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        raise RefusalError(f"expected a division in float32 or less, got {kind_name(precision)}")
    if not x.dtype.is_floating_point:
        x = x.to(torch.float32)
    scaled = x / spread(scale, x, axis, block)
    if kind in LARGEST:
        return to_float8(scaled, kind, saturate)
    if kind not in RANGES:
        raise RefusalError(f"expected integers or 8-bit floats to quantize to, got {kind_name(kind)}")
    rounded = torch.round(scaled)
    if node.has(2):
        rounded = rounded + spread(_as_float(node.tensor(2), x.dtype), x, axis, block)
    low, high = RANGES[kind]
    clamped = torch.clamp(rounded, low, high)
    dtype = dtype_of(kind)
    return clamped.to(torch.int32).to(dtype) if dtype == torch.uint16 else clamped.to(dtype)


def _as_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@rule("DequantizeLinear")
@rule("DequantizeLinear", domain=MICROSOFT)
def dequantize(node: Node) -> Tensor:
    """(x - zero point) · scale."""
    x, scale = node.tensor(0), node.tensor(1)
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    told = node.integer("output_dtype", 0)
    wide = _as_float(x, torch.float64 if x.dtype == torch.int32 else scale.dtype)
    if node.has(2):
        wide = wide - spread(_as_float(node.tensor(2), wide.dtype), x, axis, block)
    result = wide * spread(scale, x, axis, block)
    wanted = dtype_of(told) if told else scale.dtype
    return result if result.dtype == wanted else result.to(wanted)


@rule("DynamicQuantizeLinear")
def dynamic_quantize(node: Node) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes over the range of x and 0, with that scale and zero point."""
    return dynamic_codes(node.tensor(0))


def dynamic_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a tensor."""
    low, high = torch.clamp(torch.amin(x), max=0), torch.clamp(torch.amax(x), min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # of zeros alone, as onnxruntime
    zero = torch.round(torch.clamp(-low / scale, 0, 255))
    codes = torch.clamp(torch.round(x / scale) + zero, 0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def _shifted(node: Node, index: int, zero: int, column: bool) -> Tensor:
    """Codes less their zero point, in float64, where sums of products are exact; a vector goes along rows, or along columns."""
    codes = node.tensor(index).to(torch.float64)
    if not node.has(zero):
        return codes
    point = node.tensor(zero).to(torch.float64)
    return codes - _aligned(point, column)


def _aligned(point: Tensor, column: bool) -> Tensor:
    if point.numel() == 1 and point.dim() <= 1:
        return point.reshape([])
    return point.unsqueeze(-1) if not column and point.dim() == 1 else point


@rule("MatMulInteger")
def matmul_integer(node: Node) -> Tensor:
    """int32 sums of products of 8-bit integers."""
    return torch.matmul(_shifted(node, 0, 2, False), _shifted(node, 1, 3, True)).to(torch.int32)


@rule("QLinearMatMul")
def qlinear_matmul(node: Node) -> Tensor:
    """Quantized operands, the result rounded to a scale and zero point of its own."""
    total = torch.matmul(_shifted(node, 0, 2, False), _shifted(node, 3, 5, True))
    factor = _aligned(node.tensor(1), False) * _aligned(node.tensor(4), True) / _aligned(node.tensor(6), False)
    return _requantized(node, total, factor, 7)


def _requantized(node: Node, total: Tensor, factor: Tensor, zero: int) -> Tensor:
    point = _aligned(node.tensor(zero).to(torch.float64), False)
    low, high = RANGES[node.kind(zero)]
    return torch.clamp(torch.round(total * factor.to(torch.float64)) + point, low, high).to(dtype_of(node.kind(zero)))


@rule("QLinearConv")
def qlinear_conv(node: Node) -> Tensor:
    """Quantized input and filters, the result rounded to a scale and zero point of its own."""
    x, weight = _shifted(node, 0, 2, True), node.tensor(3).to(torch.float64)
    per_filter = [1] * (weight.dim() - 1)
    weight = weight - _by_filter(node.tensor(5).to(torch.float64), [-1, *per_filter])
    total = convolve(x, weight, _wide(node.optional(8)), window(node, x.shape[2:], weight.shape[2:]), node.integer("group", 1))
    factor = node.tensor(1).reshape([]) * _by_filter(node.tensor(4), [1, -1, *per_filter[1:]]) / node.tensor(6).reshape([])
    return _requantized(node, total, factor, 7)


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float64)


def _by_filter(part: Tensor, shape: list[Any]) -> Tensor:
    return part.reshape([]) if part.numel() == 1 else part.reshape(shape)
