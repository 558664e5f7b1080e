"""Operators of the domain com.microsoft, which onnxruntime's own tools write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import MICROSOFT, rule
from qcompile.frontend.onnx.rules.attention import rotated
from qcompile.frontend.onnx.rules.elementwise import gelu
from qcompile.frontend.onnx.rules.normalization import rms_norm
from qcompile.frontend.onnx.values import Held, RefusalError

rule("Gelu", domain=MICROSOFT)(gelu)


@rule("FastGelu", domain=MICROSOFT)
def fast_gelu(node: Node) -> Tensor:
    """The gelu by tanh of x plus a bias."""
    return F.gelu(_biased(node), approximate="tanh")


@rule("BiasGelu", domain=MICROSOFT)
def bias_gelu(node: Node) -> Tensor:
    """The gelu of x plus a bias."""
    return F.gelu(_biased(node))


def _biased(node: Node) -> Tensor:
    bias = node.optional(1)
    return node.tensor(0) if bias is None else node.tensor(0) + bias


@rule("QuickGelu", domain=MICROSOFT)
def quick_gelu(node: Node) -> Tensor:
    """X · sigmoid(alpha · x)."""
    x, alpha = node.tensor(0), node.real("alpha", 1.702)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)


@rule("FusedMatMul", domain=MICROSOFT)
def fused_matmul(node: Node) -> Tensor:
    """Alpha times the product, either operand transposed in its last two dimensions."""
    a, b = node.tensor(0), node.tensor(1)
    if node.flag("transBatchA") or node.flag("transBatchB"):
        raise RefusalError("expected operands transposed in their last two dimensions, got transBatchA or transBatchB")
    a = a.transpose(-1, -2) if node.flag("transA") else a
    transposed, alpha = node.flag("transB"), node.real("alpha", 1.0)
    if isinstance(node.value(1), Held) and b.dim() == 2:
        result = F.linear(a, b if transposed else b.t())
    else:
        result = torch.matmul(a, b.transpose(-1, -2) if transposed else b)
    return result if alpha == 1 else result * alpha


@rule("SimplifiedLayerNormalization", domain=MICROSOFT)
@rule("SimplifiedLayerNormalization")
def simplified_layer_norm(node: Node) -> Tensor:
    """A norm by the root of the mean square."""
    node.ignore("stash_type")
    return rms_norm(node.tensor(0), node.tensor(1), node.real("epsilon", 1e-5), node.integer("axis", -1))


@rule("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_norm(node: Node) -> tuple[Any, ...]:
    """The norm of a sum, and the sum as fourth output."""
    total = _sum(node, 3)
    return rms_norm(total, node.tensor(2), node.real("epsilon", 1e-5)), *_statistics(node), total


@rule("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(node: Node) -> tuple[Any, ...]:
    """The norm of a sum, and the sum as fourth output."""
    total, gain, bias = _sum(node, 4), node.tensor(2), node.optional(3)
    return F.layer_norm(total, [gain.shape[0]], gain, bias, node.real("epsilon", 1e-5)), *_statistics(node), total


def _sum(node: Node, bias: int) -> Tensor:
    total = node.tensor(0) + node.tensor(1)
    return total + node.tensor(bias) if node.has(bias) else total


def _statistics(node: Node) -> tuple[None, None]:
    if node.wants(1) or node.wants(2):
        raise RefusalError("expected the norm and the sum as outputs, got the mean or the deviation too")
    return None, None


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(node: Node) -> Tensor:
    """Halves, or neighbours, rotated by rows of the tables from a position on, or by each token's position."""
    x, positions, cos, sin = node.tensors()
    width, heads, interleaved = node.integer("rotary_embedding_dim", 0), node.integer("num_heads", 0), node.flag("interleaved")
    if node.flag("is_packed_batching") or node.real("scale", 1.0) != 1:
        raise RefusalError("expected plain positions, got packed batches or a scale")
    flat = x.dim() == 3
    length = x.shape[1] if flat else x.shape[2]
    if positions.dim() == 1:
        positions = (positions + torch.arange(length)).unsqueeze(0)
    size = width or 2 * cos.shape[-1]
    count = heads or (x.shape[-1] // size if flat else x.shape[1])
    split = x.reshape(x.shape[0], length, count, x.shape[2] // count).transpose(1, 2) if flat else x
    turned = rotated(split, F.embedding(positions, cos), F.embedding(positions, sin), width, interleaved)
    return turned.transpose(1, 2).flatten(2) if flat else turned


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_bits(node: Node) -> Tensor:
    """A linear with codes [N, G, bytes], low bits first, a scale and a zero point per block along K."""
    columns, rows, bits = int(node.required("K")), int(node.required("N")), node.integer("bits", 4)
    block = int(node.required("block_size"))
    node.ignore("accuracy_level")
    if node.has(4):
        raise RefusalError("expected blocks in the order of the inputs, got g_idx")
    if bits not in (2, 4, 8):
        raise RefusalError(f"expected 2, 4 or 8 bits, got {bits}")
    groups = -(-columns // block)
    codes = codes_of(node.tensor(1).reshape(rows, -1), bits).reshape(rows, groups, block)
    scale = node.tensor(2).reshape(rows, groups, 1)
    zero = _zero_point(node, rows, groups, bits, scale.dtype)
    weight = ((codes.to(scale.dtype) - zero) * scale).reshape(rows, groups * block)
    return F.linear(node.tensor(0), weight[:, :columns] if groups * block != columns else weight, node.optional(5))


def codes_of(packed: Tensor, bits: int) -> Tensor:
    """Bytes [N, n] as codes [N, n · 8 / bits], low bits first."""
    if bits == 8:
        return packed
    parts = [torch.bitwise_and(torch.bitwise_right_shift(packed, shift), (1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def _zero_point(node: Node, rows: int, groups: int, bits: int, dtype: torch.dtype) -> Any:
    if not node.has(3):
        return float(1 << (bits - 1))
    given = node.tensor(3)
    if given.dtype != torch.uint8:
        return given.to(dtype).reshape(rows, groups, 1)
    return codes_of(given.reshape(rows, -1), bits)[:, :groups].to(dtype).unsqueeze(-1)
