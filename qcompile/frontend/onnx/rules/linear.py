"""Matrix products: a product with a constant matrix becomes a linear when the graph is canonicalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import OWN, rule
from qcompile.frontend.onnx.values import Held


@rule("MatMul")
def matmul(node: Node) -> Tensor:
    """As numpy's matmul; with a weight [K, N] the linear of its transpose."""
    x, y = node.tensor(0), node.tensor(1)
    if isinstance(node.value(1), Held) and y.dim() == 2 and x.dim() >= 2 and not isinstance(node.value(0), Held):
        return product(x, y)
    return torch.matmul(x, y)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X [..., K] times a weight [K, N]; integers have no linear in torch."""
    if not x.dtype.is_floating_point:
        return torch.matmul(x, weight) if bias is None else torch.matmul(x, weight) + bias
    return F.linear(x, weight.t(), bias)


@rule("Linear", domain=OWN)
def linear(node: Node) -> Tensor:
    """A product with a weight [K, N], or transposed [N, K], plus a bias [N]."""
    x, weight = node.tensor(0), node.tensor(1)
    return F.linear(x, weight if node.flag("transposed") else weight.t(), node.tensor(2))


@rule("Gemm")
def gemm(node: Node) -> Tensor:
    """Alpha · A B + beta · C, either transposed."""
    a, b, c = node.tensor(0), node.tensor(1), node.optional(2)
    alpha, beta = node.real("alpha", 1.0), node.real("beta", 1.0)
    a = a.t() if node.flag("transA") else a
    transposed = node.flag("transB")
    if alpha == 1 and beta == 1 and a.dtype.is_floating_point:
        row = c if c is not None and c.dim() == 1 and c.shape[0] == b.shape[0 if transposed else 1] else None
        result = F.linear(a, b if transposed else b.t(), row)
        return result if c is None or row is not None else result + c
    result = torch.matmul(a, b.t() if transposed else b)
    result = result if alpha == 1 else _whole(result * alpha, a)
    return result if c is None else result + (c if beta == 1 else _whole(c * beta, a))


def _whole(scaled: Tensor, like: Tensor) -> Tensor:
    return scaled.to(like.dtype)


@rule("Einsum")
def einsum(node: Node) -> Tensor:
    """The equation in lower case without blanks, as torch spells it."""
    return torch.einsum(str(node.required("equation")).replace(" ", ""), *node.tensors())


@rule("Det")
def determinant(node: Node) -> Any:
    """Of square matrices in the last two dimensions."""
    return torch.linalg.det(node.tensor(0))
