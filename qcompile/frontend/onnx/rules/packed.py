"""What quantized models are read back to (`qcompile.frontend.onnx.read_back`): packed weights, codes of activations, products of both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import OWN, rule
from qcompile.frontend.onnx.values import RefusalError
from qcompile.ir import allowed as _allowed  # noqa: F401  registers the operators

qcompile = torch.ops.qcompile


@rule("Unpack", domain=OWN)
def unpack(node: Node) -> Tensor:
    """The weight [N, K] that codes, scale and zero point stand for, or filters [N, C, ...]."""
    columns, shape = int(node.required("columns")), node.integers("shape")
    node.ignore("rows")
    bits, group = int(node.required("bits")), int(node.required("group_size"))
    element, second = node.text("element", "int"), node.optional(3)
    parts = (node.tensor(0), node.tensor(1), node.optional(2))
    made: Tensor = qcompile.dequantize(*parts, bits, group, columns, torch.float32, element, second)
    return made if shape is None else made.reshape(shape)


@rule("Embedding", domain=OWN)
def embedding(node: Node) -> Tensor:
    """Rows of a table."""
    return F.embedding(node.tensor(1), node.tensor(0))


@rule("QuantizeStatic", domain=OWN)
def quantize_static(node: Node) -> Tensor:
    """Codes int8 by a scale that is a constant."""
    codes: Tensor = qcompile.quantize_static(node.tensor(0), node.tensor(1), node.optional(2), int(node.required("bits")))
    return codes


@rule("DequantizeActivation", domain=OWN)
def dequantize_activation(node: Node) -> Tensor:
    """The numbers that codes stand for."""
    made: Tensor = qcompile.dequantize_activation(node.tensor(0), node.tensor(1), node.optional(2), -1, torch.float32)
    return made


@rule("IntegerLinear", domain=OWN)
def integer_linear(node: Node) -> Tensor:
    """Codes [..., K] times a packed weight, by a scale of each token or of the whole; codes without a sign are counted from -128."""
    codes, scale, zero = node.tensor(0), node.tensor(1), node.optional(2)
    weight, w_scale, w_zero, bias = node.tensor(3), node.tensor(4), node.optional(5), node.optional(6)
    bits = int(node.required("bits"))
    node.ignore("rows")
    if codes.dtype == torch.uint8:
        codes = (codes.to(torch.int16) - 128).to(torch.int8)
        zero = torch.full([1], -128, dtype=torch.int32) if zero is None else zero.to(torch.int32) - 128
    scale = _beside(scale, codes)
    zero = None if zero is None else _beside(zero.to(torch.int32), codes)
    if zero is not None and zero.dim() != scale.dim():
        zero = zero.expand(scale.shape) if zero.dim() == 1 else zero
        scale = scale.expand(zero.shape) if scale.dim() == 1 else scale
    made: Tensor = qcompile.integer_linear(codes, scale, zero, weight, w_scale, w_zero, bias, -1, bits, -1, torch.float32)
    return made


def _beside(part: Tensor, codes: Tensor) -> Tensor:
    """One number as [1]; one for each token as [..., 1]."""
    if part.numel() == 1 and part.dim() < 2:
        return part.reshape(1)
    if part.shape[-1] != 1 or part.dim() > codes.dim():
        raise RefusalError(f"expected one scale and zero point for each row of codes, got {list(part.shape)}")
    return part.expand([*codes.shape[:-1], 1])
