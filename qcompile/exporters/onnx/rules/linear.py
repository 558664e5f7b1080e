"""Matrix products of floats."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument
from qcompile.exporters.onnx.rules.table import rule

_LINEAR = torch.ops.aten.linear.default


@rule("aten.linear.default")
def linear(e: Emitter, node: Call) -> Value:
    """X times the transposed weight [N, K], plus the bias."""
    x, weight = node.args[:2]
    return biased(e, e.op("MatMul", e.value(x), transposed(e, weight)), argument(node, 2, "bias", None))


def transposed(e: Emitter, weight: Any) -> Value:
    """A matrix [N, K] as [K, N]: stored so where it is a constant that nothing reads as it is."""
    if weight.op != "get_attr" or any(user.target is not _LINEAR for user in weight.users):
        return e.swap_last(e.value(weight), len(e.shape(weight)))
    rows, columns = e.shape(weight)
    return e.from_constant(weight, "transposed", e.dtype(weight), (columns, rows), lambda tensor: tensor.t())


def biased(e: Emitter, made: Value, bias: Any) -> Value:
    """With a bias, if there is one."""
    return made if bias is None else e.op("Add", made, e.value(bias))


@rule("aten.matmul.default", "aten.bmm.default")
def matmul(e: Emitter, node: Call) -> Value:
    """Batched as torch batches."""
    return e.op("MatMul", e.value(node.args[0]), e.value(node.args[1]))


@rule("aten.addmm.default", "aten.baddbmm.default")
def addmm(e: Emitter, node: Call) -> Value:
    """Beta times the first plus alpha times the product of the others."""
    first, left, right = (e.value(item) for item in node.args[:3])
    dtype, product = e.dtype(node), e.op("MatMul", left, right)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    product = product if alpha == 1 else e.op("Mul", product, e.constant(alpha, dtype))
    first = first if beta == 1 else e.op("Mul", first, e.constant(beta, dtype))
    return e.op("Add", first, product)


@rule("aten.einsum.default")
def einsum(e: Emitter, node: Call) -> Value:
    """By its equation."""
    equation, parts = node.args[:2]
    return e.op("Einsum", *(e.value(part) for part in parts), equation=str(equation))
