"""The `qcompile::` operators: schema, CPU reference (the definition) and fake. Float work is done in at least float32.

Shape letters: B batch, S tokens of this call, T tokens in the cache or key sequence, H query heads, L key/value heads,
D head size, K input columns, N output rows, G groups, P pages, R tokens in a page, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.quant import reference

NAMESPACE = "qcompile"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
Reference = TypeVar("Reference", bound=Callable[..., object])


def define(schema: str, fake: Callable[..., object]) -> Callable[[Reference], Reference]:
    """Register the decorated reference under `schema`, with `fake` for shapes."""

    def register(implementation: Reference) -> Reference:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return implementation

    return register


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that reductions over a tensor of `dtype` are done in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _like_first(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0) -> Tensor", _like_first)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x², -1) + eps) · (offset + weight)`; x [..., K], weight [K]; offset is 1 for Gemma (arXiv:1910.07467)."""
    wide = x.to(working_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (weight.to(wide.dtype) + offset)
    return normed.to(x.dtype)


def _fake_add_rms_norm(x: Tensor, residual: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@define("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset=0.0) -> (Tensor, Tensor)", _fake_add_rms_norm)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The residual sum `x + residual` and its `rms_norm`, both [..., K]."""
    total = x + residual
    return total, rms_norm(total, weight, eps, offset)


def _fake_rotary_table(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    table = inv_freq.new_empty((*positions.shape, 2 * inv_freq.shape[0]), dtype=dtype)
    return table, torch.empty_like(table)


@define("rotary_table(Tensor positions, Tensor inv_freq, float scaling, ScalarType dtype) -> (Tensor, Tensor)", _fake_rotary_table)
def rotary_table(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, 2F] of `positions` [B, S] times `inv_freq` [F], twice side by side (arXiv:2104.09864)."""
    work = working_dtype(inv_freq.dtype)
    angle = positions.to(work).unsqueeze(-1) * inv_freq.to(work)
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


@define("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor", _like_first)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [B, H, S, R] by cos and sin [B or 1, S, R]: `x·cos + cat(-x_high, x_low)·sin`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@define("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor", _like_first)
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) · up`, elementwise: SwiGLU for silu, GeGLU for gelu (arXiv:2002.05202)."""
    return ACTIVATIONS[activation](gate) * up


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Grouped attention; a query that may see nothing gives 0. Values v [B, L, T, D], all else as for `attention_weights`."""
    weights = attention_weights(q, k, keep, bias, scale, softcap, sinks)
    batch, heads, queries, keys = weights.shape
    mixed = torch.matmul(weights.view(batch, k.shape[1], -1, queries, keys), v.to(weights.dtype).unsqueeze(2))
    return mixed.view(batch, heads, queries, v.shape[3]).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def attention_weights(
    q: Tensor, k: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """What each query gives each key of its attention, [B, H, S, T] in at least float32; 0 everywhere where it may see nothing.

    q [B, H, S, D], k [B, L, T, D] with L dividing H, keep bool broadcastable to [B, 1, S, T], bias float broadcastable
    to [B, H, S, T], softcap 0 for none (else `softcap·tanh(score/softcap)`), sinks [H] extra logits that take weight and give 0.
    """
    work = working_dtype(q.dtype)
    batch, heads, queries, _ = q.shape
    groups = heads // k.shape[1]
    grouped = q.to(work).view(batch, k.shape[1], groups, queries, q.shape[3])
    scores = torch.matmul(grouped, k.to(work).unsqueeze(2).transpose(-1, -2)).view(batch, heads, queries, k.shape[2]) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(work)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(work).view(1, -1, 1, 1).expand(batch, heads, queries, 1)), dim=-1)
    peak = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(torch.isfinite(peak), peak, torch.zeros_like(peak)))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    return weights if sinks is None else weights[..., :-1]


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return _token_major(q, v)


def _token_major(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, D] in the memory order of [B, S, H, D], so that heads join without a copy."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


@define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor? bias, float scale, bool causal, int "
    "window=0, float softcap=0.0, Tensor? sinks=None, str cache='') -> Tensor",
    _fake_attention,
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor | None,
    scale: float, causal: bool, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, cache: str = "",
) -> Tensor:  # fmt: skip
    """Attention without a cache: q [B, H, S, D], k and v [B, L, T, D], padding [B, T] (nonzero = a real token), result [B, H, S, D].

    `causal` lets query i (aligned to the end, T - S + i) see keys up to itself; `window` > 0 only the last `window` of those. `cache` says
    how keys and values will be stored, as `int4 t32 asym / int4 g32 asym`; empty is as the target says.
    """
    del cache
    queries, keys = q.shape[2], k.shape[2]
    keep = None
    if causal:
        row = torch.arange(queries, device=q.device).unsqueeze(1) + (keys - queries)
        column = torch.arange(keys, device=q.device).unsqueeze(0)
        keep = column <= row
        if window:
            keep = keep & (column > row - window)
        keep = keep.view(1, 1, queries, keys)
    if padding is not None:
        present = (padding != 0).view(padding.shape[0], 1, 1, keys)
        keep = present if keep is None else keep & present
    return masked_attention(q, k, v, keep, bias, scale, softcap, sinks)


def slots(page_table: Tensor, positions: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Physical page and row [B, S] of logical `positions` [B, S] (all >= 0) through `page_table` [B, pages]."""
    index = positions.long()
    return page_table.long().gather(1, index // page_tokens), index % page_tokens


def _write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor) -> None:
    real = positions >= 0
    page, row = slots(page_table, positions.clamp(min=0), keys.shape[2])
    page, row = page[real], row[real]
    keys[page, :, row] = k.transpose(1, 2)[real].to(keys.dtype)
    values[page, :, row] = v.transpose(1, 2)[real].to(values.dtype)


def _fake_cache_append(keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(keys), torch.empty_like(values)


@define(
    "cache_append(Tensor keys, Tensor values, Tensor k, Tensor v, Tensor page_table, Tensor positions) -> (Tensor, Tensor)",
    _fake_cache_append,
)
def cache_append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The cache with k, v [B, L, S, D] stored at `positions` [B, S]; a token at position -1 is padding and is not stored.

    keys, values [P, L, R, D]: P pages of R tokens; page_table [B, pages per sequence] maps position p to page `p // R`, row `p % R`.
    """
    keys, values = keys.clone(), values.clone()
    _write(keys, values, k, v, page_table, positions)
    return keys, values


@define("cache_append_(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor page_table, Tensor positions) -> ()", lambda *_: None)
def cache_append_(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor) -> None:
    """`cache_append` in place: what memory planning turns it into."""
    _write(keys, values, k, v, page_table, positions)


def _fake_cache_attend(q: Tensor, keys: Tensor, values: Tensor, *_: object, **__: object) -> Tensor:
    return _token_major(q, values)


@define(
    "cache_attend(Tensor q, Tensor keys, Tensor values, Tensor page_table, Tensor positions, float scale, int "
    "window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    _fake_cache_attend,
)
def cache_attend(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [B, H, S, D] over the cache: the query at position p sees stored positions <= p (the last `window` if > 0).

    A padding query (position -1) sees nothing and gives 0. Result [B, H, S, D].
    """
    page_tokens = keys.shape[2]
    longest = max(1, int(positions.max()) + 1) if positions.numel() else 1
    pages = page_table.long()[:, : max(1, -(-longest // page_tokens))]
    k = keys[pages].transpose(1, 2).flatten(2, 3)[:, :, :longest]
    v = values[pages].transpose(1, 2).flatten(2, 3)[:, :, :longest]
    column = torch.arange(longest, device=q.device).view(1, 1, 1, -1)
    row = positions.view(positions.shape[0], 1, -1, 1)
    keep = column <= row
    if window:
        keep = keep & (column > row - window)
    return masked_attention(q, k, v, keep, None, scale, softcap, sinks)


def _fake_dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype,
    *_: object, **__: object,
) -> Tensor:  # fmt: skip
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


@define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, int columns, ScalarType dtype, "
    'str element="int", Tensor? scale2=None) -> Tensor',
    _fake_dequantize,
)
def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype,
    element: str = "int", scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Packed codes uint8 [N, ceil(K·b/8)] to [N, K]; see `qcompile.quant.reference.dequantize`."""
    return reference.dequantize(codes, scale, zero, bits, group_size, columns, dtype, element, scale2)


def _fake_quantized_linear(x: Tensor, codes: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    'str element="int", Tensor? scale2=None) -> Tensor',
    _fake_quantized_linear,
)
def quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    element: str = "int", scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`x · dequantize(codes)ᵀ + bias`: x [..., K], codes uint8 [N, ceil(K·b/8)], result [..., N]."""
    weight = reference.dequantize(codes, scale, zero, bits, group_size, x.shape[-1], x.dtype, element, scale2)
    return functional.linear(x, weight, bias)


def _fake_quantized_embedding(
    indices: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype,
    *_: object, **__: object,
) -> Tensor:  # fmt: skip
    return codes.new_empty((*indices.shape, columns), dtype=dtype)


@define(
    "quantized_embedding(Tensor indices, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, int "
    'columns, ScalarType dtype, str element="int", Tensor? scale2=None) -> Tensor',
    _fake_quantized_embedding,
)
def quantized_embedding(
    indices: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype,
    element: str = "int", scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows `indices` of the dequantized table [N, K]: result [..., K]."""
    flat = indices.flatten()
    picked = None if zero is None else zero[flat]
    second = scale2 if scale2 is None or scale2.numel() == 1 else scale2[flat]
    rows = reference.dequantize(codes[flat], scale[flat], picked, bits, group_size, columns, dtype, element, second)
    return rows.view(*indices.shape, columns)


@define(
    "moe_experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, str activation) -> Tensor",
    _like_first,
)
def moe_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Mixture of gated experts: each token's row of x [M, K] through its experts, weighted and summed (arXiv:2401.04088).

    indices [M, n] expert numbers, weights [M, n], gate_up [E, 2I, K] (gate rows first), down [E, K, I]; result [M, K].
    """
    result = torch.zeros_like(x)
    for expert in sorted({int(number) for number in indices.flatten().tolist()}):
        token, choice = (indices == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        hidden = functional.linear(gated_activation(gate, up, activation), down[expert])
        result.index_add_(0, token, hidden * weights[token, choice].unsqueeze(-1).to(x.dtype))
    return result


def _fake_gather_last(x: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1, x.shape[2]))


@define("gather_last(Tensor x, Tensor positions) -> Tensor", _fake_gather_last)
def gather_last(x: Tensor, positions: Tensor) -> Tensor:
    """The row of x [B, S, K] at each sequence's greatest position (the last real token): [B, 1, K]."""
    last = positions.argmax(dim=1).view(-1, 1, 1).expand(-1, 1, x.shape[2])
    if x.dtype == torch.float8_e4m3fn:  # torch gathers no float8
        return x.view(torch.uint8).gather(1, last).view(x.dtype)
    return x.gather(1, last)
