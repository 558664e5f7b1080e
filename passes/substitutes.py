"""What runs in place of an operator's reference when a graph runs over much text: the same with less memory, or less time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir import ops
from qcompile.quant.precision import medium_precision


def attention(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor | None,
    scale: float, causal: bool, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, cache: str = "",
) -> Tensor:  # fmt: skip
    """`qcompile::attention`; padding, windows shorter than the text, biases, soft caps and sinks go to the reference."""
    del cache
    queries, keys = q.shape[2], k.shape[2]
    special = bias is not None or softcap or sinks is not None or 0 < window < keys
    if special or (causal and queries != keys) or (padding is not None and not bool((padding != 0).all())):
        return ops.attention(q, k, v, padding, bias, scale, causal, window, softcap, sinks)
    return _blocked(q, k, v, scale, causal=causal)


def cache_attend(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`qcompile::cache_attend`, blocked where every row starts at position 0, has no padding and fills one page."""
    tokens = positions.shape[1]
    whole = page_table.shape[1] == 1 and keys.shape[2] == tokens and bool((positions == torch.arange(tokens)).all())
    if not whole or softcap or sinks is not None or 0 < window < tokens:
        return ops.cache_attend(q, keys, values, page_table, positions, scale, window, softcap, sinks)
    pages = page_table[:, 0].long()
    return _blocked(q, keys[pages].to(q.dtype), values[pages].to(q.dtype), scale, causal=True)


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    if causal and q.dtype == torch.float32 and has_bfloat16_units() and q.shape[2] == k.shape[2]:
        return _triangular(q, k, v, scale)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).contiguous().transpose(1, 2)  # heads of a token side by side, as the reference leaves them


def _triangular(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention in blocks of queries, each with the keys up to its own: half the time of a product that masks the rest.

    q [B, H, S, D], k and v [B, L, S, D]; H/L queries share a key and are stacked.
    """
    (batch, heads, tokens, size), shared, width = q.shape, k.shape[1], v.shape[3]
    stacked = (q * scale).reshape(batch * shared, heads // shared, tokens, size)
    keys, values = k.reshape(batch * shared, tokens, size).transpose(1, 2), v.reshape(batch * shared, tokens, width)
    result = q.new_empty(batch, tokens, shared, heads // shared, width)  # heads of a token side by side, as the reference leaves them
    with medium_precision():
        for start in range(0, tokens, _QUERIES):
            end = min(start + _QUERIES, tokens)
            scores = torch.bmm(stacked[:, :, start:end].reshape(batch * shared, -1, size), keys[:, :, :end])
            scores = scores.view(batch * shared, heads // shared, end - start, end)
            scores[..., start:] += scores.new_full((end - start, end - start), -torch.inf).triu(1)
            mixed = torch.bmm(scores.softmax(-1).view(batch * shared, -1, end), values[:, :end])
            result[:, start:end] = mixed.view(batch, shared, heads // shared, end - start, width).permute(0, 3, 1, 2, 4)
    return result.view(batch, tokens, heads, width).transpose(1, 2)


_QUERIES = 128
"""Of a block: fewer multiply less that is masked, but in smaller products."""


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias` in float32, the product of bfloat16 operands where the CPU has units for it: three times as fast.

    Its error, 2⁻⁹ of an element, is small beside any rounding that is calibrated this way.
    """
    narrow = narrowed(weight)
    if narrow.dtype != torch.bfloat16:
        return functional.linear(x, weight, bias)
    product = functional.linear(x.bfloat16(), narrow).float()
    return product if bias is None else product + bias


def narrowed(matrix: Tensor) -> Tensor:
    """The operand of a linear in bfloat16 where the CPU multiplies that faster, else in float32."""
    narrow = matrix.dim() == 2 and min(matrix.shape) >= LEAST_NARROW and has_bfloat16_units()
    return matrix.to(torch.bfloat16 if narrow else torch.float32)


LEAST_NARROW = 128
"""Smaller products gain nothing from bfloat16."""


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


SUBSTITUTES: dict[Any, Any] = {torch.ops.qcompile.attention.default: attention, torch.ops.qcompile.cache_attend.default: cache_attend}
"""Operator -> what computes the same with less memory."""

NARROW: dict[Any, Any] = SUBSTITUTES | {torch.ops.aten.linear.default: narrow_linear}
"""The same, with linears of less precision in less time."""
