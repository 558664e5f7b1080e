"""Attention and rotary positions of opset 23 and later, as the compiler's own operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError, is_symbolic


@dataclass(frozen=True)
class Operands:
    """q [B, H, S, D], k and v [B, L, T, D], how many keys were there before, and what scores become."""

    q: Tensor
    k: Tensor
    v: Tensor
    past: Any
    scale: float
    softcap: float


@rule("Attention")
def attention(node: Node) -> tuple[Any, ...]:
    """Scaled products of queries and keys, capped, masked and weighted; the cache's keys come before the new ones."""
    flat = node.tensor(0).dim() == 3
    q, k, v = (_heads(node, index) for index in range(3))
    past = 0
    if node.has(4) and node.has(5):
        past = node.tensor(4).shape[2]
        k, v = torch.cat([node.tensor(4), k], 2), torch.cat([node.tensor(5), v], 2)
    node.ignore("softmax_precision")  # computed in float32 at least
    scale = node.real("scale", 0.0) or float(q.shape[-1]) ** -0.5
    operands = Operands(q, k, v, past, scale, node.real("softcap", 0.0))
    causal, bias = _visibility(node, operands)
    if node.wants(3) or q.shape[-1] != v.shape[-1]:
        result, scores = _spelled_out(operands, _with_causal(operands, bias) if causal else bias, node.integer("qk_matmul_output_mode", 0))
    else:
        node.ignore("qk_matmul_output_mode")
        result, scores = torch.ops.qcompile.attention(q, k, v, None, bias, scale, causal, 0, operands.softcap), None
    if flat:
        result = result.transpose(1, 2).flatten(2)
    return result, k, v, scores


def _heads(node: Node, index: int) -> Tensor:
    """[B, S, H·D] split into [B, H, S, D]; four dimensions are that already."""
    x = node.tensor(index)
    node.ignore("q_num_heads", "kv_num_heads")
    if x.dim() == 4:
        return x
    count = int(node.required("kv_num_heads" if index else "q_num_heads"))
    return x.reshape(x.shape[0], x.shape[1], count, x.shape[2] // count).transpose(1, 2)


def _visibility(node: Node, operands: Operands) -> tuple[bool, Tensor | None]:
    """Whether queries see the past only, as the compiler's operator counts it, and everything else as a bias."""
    queries, keys = operands.q.shape[2], operands.k.shape[2]
    bias = _mask(node, keys)
    left, right = node.integer("left_window_size", -1), node.integer("right_window_size", -1)
    causal = node.flag("is_causal")
    if node.has(6):
        valid = node.tensor(6).reshape(-1, 1, 1, 1)
        bias = _and(bias, torch.arange(keys) < valid)
        offset: Any = valid - queries
    else:
        offset = operands.past
    plain = not node.has(6) and (_same(keys, queries + operands.past))
    if causal and plain and left < 0 and right < 0:
        return True, bias
    row, column = torch.arange(queries).unsqueeze(1) + offset, torch.arange(keys)
    for limit in ([column <= row] if causal else []) + ([column >= row - left] if left >= 0 else []):
        bias = _and(bias, limit)
    return False, bias if right < 0 else _and(bias, column <= row + right)


def _same(left: Any, right: Any) -> bool:
    return str(left) == str(right) if is_symbolic(left) or is_symbolic(right) else bool(left == right)


def _mask(node: Node, keys: Any) -> Tensor | None:
    """The mask as a bias that broadcasts to [B, H, S, T]; a shorter one hides the keys beyond it."""
    mask = node.optional(3)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = _hidden(mask)
    if not _same(mask.shape[-1], keys) and mask.shape[-1] != 1:
        mask = torch.nn.functional.pad(mask, [0, keys - mask.shape[-1]], value=-math.inf)
    return mask.reshape([1] * (4 - mask.dim()) + list(mask.shape)) if mask.dim() < 4 else mask


def _hidden(keep: Tensor) -> Tensor:
    return torch.zeros_like(keep, dtype=torch.float32).masked_fill(torch.logical_not(keep), -math.inf)


def _and(bias: Tensor | None, keep: Tensor) -> Tensor:
    hidden = _hidden(keep)
    hidden = hidden.reshape([1] * (4 - hidden.dim()) + list(hidden.shape)) if hidden.dim() < 4 else hidden
    return hidden if bias is None else bias + hidden


def _with_causal(operands: Operands, bias: Tensor | None) -> Tensor:
    row = torch.arange(operands.q.shape[2]).unsqueeze(1) + operands.past
    return _and(bias, torch.arange(operands.k.shape[2]) <= row)


def _spelled_out(operands: Operands, bias: Tensor | None, mode: int) -> tuple[Tensor, Tensor]:
    """The result and, by `mode`, the products, the capped ones, the masked ones or the weights."""
    groups = operands.q.shape[1] // operands.k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (operands.k, operands.v))
    products = torch.matmul(operands.q, k.transpose(-1, -2)) * operands.scale
    capped = operands.softcap * torch.tanh(products / operands.softcap) if operands.softcap else products
    masked = capped if bias is None else capped + bias
    blind = (masked == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(masked, -1).masked_fill(blind, 0.0)
    if mode not in range(4):
        raise RefusalError(f"expected qk_matmul_output_mode 0 to 3, got {mode}")
    return torch.matmul(weights, v), (products, capped, masked, weights)[mode]


@rule("RotaryEmbedding")
def rotary_embedding(node: Node) -> Tensor:
    """Halves, or neighbours, rotated by rows of the tables that the positions choose."""
    x = node.tensor(0)
    heads = node.integer("num_heads", 0)
    if x.dim() == 3 and not heads:
        raise RefusalError("expected num_heads for an input of three dimensions, got none")
    cos, sin = node.tensor(1), node.tensor(2)
    if node.has(3):
        cos, sin = (torch.nn.functional.embedding(node.tensor(3), table) for table in (cos, sin))
    width, interleaved = node.integer("rotary_embedding_dim", 0), node.flag("interleaved")
    if x.dim() == 4:
        return rotated(x, cos, sin, width, interleaved)
    split = x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)
    return rotated(split, cos, sin, width, interleaved).transpose(1, 2).flatten(2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, width: int, interleaved: bool) -> Tensor:
    """X [B, H, S, D] whose first `width` elements (0: all) are rotated by cos and sin [B, S, width/2]."""
    size = width or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos[..., : size // 2], sin[..., : size // 2]
    if interleaved:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        even, odd = turned.reshape([*turned.shape[:-1], size // 2, 2]).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    else:
        turned = torch.ops.qcompile.rope(turned, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    return turned if size == x.shape[-1] else torch.cat([turned, rest], -1)
