"""Attention of onnxruntime: grouped queries with rotary positions inside, and many heads over flat operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import MICROSOFT, rule
from qcompile.frontend.onnx.rules.attention import rotated
from qcompile.frontend.onnx.values import RefusalError


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(node: Node) -> tuple[Any, ...]:
    """Causal, with padding on the right told by lengths; without a past, which is how a language model is read."""
    heads, count = int(node.required("num_heads")), int(node.required("kv_num_heads"))
    q, k, v = _grouped(node, heads, count)
    stored = {node.text(name, "NONE") for name in ("k_quant_type", "v_quant_type")}
    if stored != {"NONE"} or node.has(12) or node.has(13):
        raise RefusalError("expected keys and values as numbers, got a cache of integers, whose scales belong to the compiler's own")
    if node.flag("smooth_softmax") or node.integer("qk_output", 0):
        raise RefusalError("expected a plain softmax and its result alone, got smooth_softmax or qk_output")
    node.ignore("kv_cache_bit_width")
    _refuse_past(node, 3)
    length = q.shape[2]
    if node.flag("do_rotary"):
        positions = node.tensor(9) if node.has(9) else torch.arange(length).unsqueeze(0)
        cos, sin = (F.embedding(positions, node.tensor(index)) for index in (7, 8))
        q, k = (rotated(x, cos, sin, 2 * cos.shape[-1], node.flag("rotary_interleaved")) for x in (q, k))
    elif node.has(7) or node.has(8) or node.has(9):
        node.flag("rotary_interleaved")
    node.ignore("rotary_interleaved")
    node.has(6)  # the number of columns: that of the keys, without a past
    real = torch.arange(length) <= node.tensor(5).reshape(-1, 1)
    scale = node.real("scale", 0.0) or float(q.shape[-1]) ** -0.5
    window, softcap = max(node.integer("local_window_size", -1), 0), node.real("softcap", 0.0)
    made = torch.ops.qcompile.attention(q, k, v, real, node.optional(10), scale, True, window, softcap, node.optional(11))
    return made.transpose(1, 2).flatten(2), k, v


def _grouped(node: Node, heads: int, count: int) -> list[Tensor]:
    """[B, H, S, D] and twice [B, L, S, D], of flat operands apart or in one."""
    if node.has(1) and node.has(2):
        flat = [node.tensor(index) for index in range(3)]
    else:
        size = node.tensor(0).shape[-1] // (heads + 2 * count)
        flat = list(torch.split_with_sizes(node.tensor(0), [heads * size, count * size, count * size], -1))
    return [_split(x, number) for x, number in zip(flat, (heads, count, count), strict=True)]


def _split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def _refuse_past(node: Node, first: int) -> None:
    for index in (first, first + 1):
        past = node.optional(index)
        if past is not None and past.numel() != 0:
            raise RefusalError(
                "expected a past that a language model is read without, or none, got one that other inputs come with; name inputs "
                "input_ids, attention_mask, position_ids and past_key_values.N.key and .value, and outputs logits and present"
            )


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(node: Node) -> tuple[Any, ...]:
    """Heads side by side in q, k, v [B, S, H·D]; a mask of keys [B, T], or a bias, is added to scores."""
    heads = int(node.required("num_heads"))
    q, k, v = _many(node, heads)
    _refuse_past(node, 6)
    low = node.real("mask_filter_value", -10000.0)
    bias = node.optional(5)
    if node.has(4):
        mask = node.tensor(4)
        if mask.dim() != 2:
            raise RefusalError(f"expected a mask of keys [B, T], got one of {mask.dim()} dimensions")
        hidden = torch.where(mask != 0, 0.0, low)[:, None, None, :]
        bias = hidden if bias is None else bias + hidden
    scale = node.real("scale", 0.0) or float(q.shape[-1]) ** -0.5
    made = torch.ops.qcompile.attention(q, k, v, None, bias, scale, node.flag("unidirectional"))
    return made.transpose(1, 2).flatten(2), k, v


def _many(node: Node, heads: int) -> list[Tensor]:
    """Q, k and v [B, H, S, D] with the bias of projections, which are three operands of three dimensions, or keys split already."""
    if not (node.has(1) and node.has(2)) or node.tensor(0).dim() != 3:
        raise RefusalError("expected q, k and v [B, S, H·D] apart, got them in one tensor")
    flat = [node.tensor(index) for index in range(3)]
    if node.has(3):
        sizes = [x.shape[-1] if x.dim() == 3 else heads * x.shape[-1] for x in flat]
        parts = torch.split_with_sizes(node.tensor(3), sizes)
        flat = [x + part if x.dim() == 3 else x for x, part in zip(flat, parts, strict=True)]
    return [_split(x, heads) if x.dim() == 3 else x for x in flat]
