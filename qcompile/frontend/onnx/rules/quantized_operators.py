"""Operators of onnxruntime over quantized tensors: the numbers that codes stand for, an ordinary operator, and codes again.

Each operand is codes, scale and perhaps zero point in a row of inputs; the result has a scale and a zero point of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.kinds import RANGES
from qcompile.frontend.onnx.node import Node, dtype_of
from qcompile.frontend.onnx.registry import MICROSOFT, rule
from qcompile.frontend.onnx.rules.microsoft import codes_of
from qcompile.frontend.onnx.rules.pooling import average_pool
from qcompile.frontend.onnx.rules.quantization import dynamic_codes
from qcompile.frontend.onnx.values import RefusalError


def _numbers(node: Node, codes: int, scale: int, zero: int) -> Tensor:
    """(x - zero point) · scale in float32; a scale for each column, or one for all."""
    x = node.tensor(codes).to(torch.float32)
    x = x - node.tensor(zero).to(torch.float32) if node.has(zero) else x
    return x * node.tensor(scale)


def _operand(node: Node, first: int) -> Tensor:
    return _numbers(node, first, first + 1, first + 2)


def _codes(node: Node, result: Tensor, scale: int) -> Tensor:
    """Rounded, ties to even, to the type of the zero point behind the scale, or of the first operand."""
    kind = node.kind(scale + 1) if node.has(scale + 1) else node.kind(0)
    if kind not in RANGES:
        raise RefusalError("expected integers to quantize to, got another type")
    node.made = kind
    rounded = torch.round(result / node.tensor(scale))
    rounded = rounded + node.tensor(scale + 1).to(torch.float32) if node.has(scale + 1) else rounded
    return torch.clamp(rounded, *RANGES[kind]).to(dtype_of(kind))


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def binary(node: Node) -> Tensor:
    """Two operands, element by element."""
    left, right = _operand(node, 0), _operand(node, 3)
    return _codes(node, left + right if node.operator == "QLinearAdd" else left * right, 6)


def _softmax(node: Node, x: Tensor) -> Tensor:
    axis = node.integer("axis", -1)
    if node.integer("opset", 13) < 13 and axis % x.dim() != x.dim() - 1:
        raise RefusalError("expected a softmax over the last axis, got one over several")
    return torch.softmax(x, axis)


def _global_average(node: Node, x: Tensor) -> Tensor:
    last = node.flag("channels_last")
    return x.mean(list(range(1, x.dim() - 1)) if last else list(range(2, x.dim())), keepdim=True)


def _average(node: Node, x: Tensor) -> Tensor:
    if node.flag("channels_last"):
        raise RefusalError("expected channels in front of the image, got channels_last")
    pooled: Tensor = average_pool(replace(node, operator="AveragePool", inputs=[x], names=[""], kinds=[None]))
    return pooled


_UNARY: dict[str, Callable[[Node, Tensor], Tensor]] = {
    "QLinearSigmoid": lambda _, x: torch.sigmoid(x),
    "QLinearLeakyRelu": lambda node, x: F.leaky_relu(x, node.real("alpha", 0.01)),
    "QLinearSoftmax": _softmax, "QLinearGlobalAveragePool": _global_average, "QLinearAveragePool": _average,
}  # fmt: skip


@rule(*_UNARY, domain=MICROSOFT)
def unary(node: Node) -> Tensor:
    """One operand."""
    return _codes(node, _UNARY[node.operator](node, _operand(node, 0)), 3)


@rule("QLinearConcat", domain=MICROSOFT)
def concat(node: Node) -> Tensor:
    """Any number of operands, behind the scale and zero point of the result."""
    parts = [_operand(node, first) for first in range(2, len(node.inputs), 3)]
    return _codes(node, torch.cat(parts, int(node.required("axis"))), 0)


@rule("QGemm", domain=MICROSOFT)
def gemm(node: Node) -> Tensor:
    """Alpha · A · B plus a bias of integers in the scale of their product; without a scale of its own the result stays as numbers."""
    a, b = _operand(node, 0), node.tensor(3).to(torch.float32)
    a = a.t() if node.flag("transA") else a
    b = b.t() if node.flag("transB") else b
    b = b - node.tensor(5).to(torch.float32) if node.has(5) else b
    alpha, scale = node.real("alpha", 1.0), node.tensor(4)
    product = torch.matmul(a, b * scale) * alpha
    if node.has(6):
        product = product + node.tensor(6).to(torch.float32) * (node.tensor(1) * scale * alpha)
    return _codes(node, product, 7) if node.has(7) else product


@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integers(node: Node) -> Tensor:
    """A product of codes as numbers, plus a bias."""
    product = torch.matmul(_numbers(node, 0, 2, 4), _numbers(node, 1, 3, 5))
    return product + node.tensor(6) if node.has(6) else product


@rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_matmul(node: Node) -> Tensor:
    """The same with activations that are rounded here, to the range that they have."""
    codes, scale, zero = dynamic_codes(node.tensor(0))
    product = torch.matmul((codes.to(torch.float32) - zero.to(torch.float32)) * scale, _numbers(node, 1, 2, 3))
    return product + node.tensor(4) if node.has(4) else product


@rule("GatherBlockQuantized", domain=MICROSOFT)
def gather_blocks(node: Node) -> Any:
    """Rows of a table of codes with a scale for each block of columns."""
    table, bits = node.tensor(0), node.integer("bits", 4)
    rows, columns = node.integer("gather_axis", 0), node.integer("quantize_axis", 1)
    block = node.integer("block_size", 128)
    if table.dim() != 2 or rows != 0 or columns % 2 != 1 or bits not in (4, 8):
        raise RefusalError("expected rows of a matrix of 4 or 8 bits with blocks along its columns, got another")
    indices = node.tensor(1)
    packed = node.kind(0) == TensorProto.UINT8 and bits == 4
    codes, scale = (F.embedding(indices, part) for part in (codes_of(table, 4) if packed else table, node.tensor(2)))
    zero: Any = (1 << (bits - 1)) if node.kind(0) == TensorProto.UINT8 else 0
    if node.has(3):
        points = node.tensor(3)
        points = codes_of(points, 4)[:, : scale.shape[-1]] if node.kind(3) == TensorProto.UINT8 and bits == 4 else points
        zero = _spread(F.embedding(indices, points.to(torch.float32)), block, codes.shape[-1])
    return (codes.to(torch.float32) - zero) * _spread(scale, block, codes.shape[-1])


def _spread(part: Tensor, block: int, columns: int) -> Tensor:
    """One number for each block as one for each column."""
    return part.repeat_interleave(block, -1).narrow(-1, 0, columns)
