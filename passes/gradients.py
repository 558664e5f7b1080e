"""Operators as functions that autograd can look into: the references themselves, or the same in less time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir import cache_ops, hadamard_ops, ops, rematerialize_ops
from qcompile.passes import substitutes

_DENSE = 1024
"""Up to so many tokens the whole matrix of scores is computed: its gradient is several times as fast as that of a blocked product."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias` in float32; the product of bfloat16 operands where the weight comes as one."""
    if weight.dtype != torch.bfloat16:
        return functional.linear(x, weight, bias)
    product = functional.linear(x.bfloat16(), weight).float()
    return product if bias is None else product + bias


def attention(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor | None,
    scale: float, causal: bool, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, cache: str = "",
) -> Tensor:  # fmt: skip
    """`qcompile::attention`, for a plain causal one of short texts with a gradient that is fast."""
    del cache
    plain = padding is None or bool((padding != 0).all())
    if not (plain and causal and bias is None and not softcap and sinks is None) or q.shape[2] != k.shape[2] or 0 < window < k.shape[2]:
        return ops.attention(q, k, v, padding, bias, scale, causal, window, softcap, sinks)
    if k.shape[2] > _DENSE:
        return substitutes.attention(q, k, v, None, None, scale, causal=True)
    return _dense(q, k, v, scale)


def cache_append(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`qcompile::cache_append` to an empty cache, which may hold packed vectors where k and v come as numbers."""
    if _fills_pages(keys, page_table, positions):
        return k, v
    empty = torch.zeros(*keys.shape[:3], k.shape[3], dtype=k.dtype)
    return ops.cache_append(empty, empty, k, v, page_table, positions)


def cache_attend(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`qcompile::cache_attend`, the same where every row starts at position 0, has no padding and fills one page."""
    if not _fills_pages(keys, page_table, positions):
        return ops.cache_attend(q, keys, values, page_table, positions, scale, window, softcap, sinks)
    return attention(q, keys, values, None, None, scale, causal=True, window=window, softcap=softcap, sinks=sinks)


def cache_attend_packed(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_tables: Sequence[Tensor] | None = None, v_tables: Sequence[Tensor] | None = None,
    inv_freq: Tensor | None = None, scaling: float = 1.0, products: str | None = None,
) -> Tensor:  # fmt: skip
    """`qcompile::cache_attend_packed` over vectors that were rounded when they were stored, and are numbers here."""
    del k_form, v_form, k_tables, v_tables, products
    if inv_freq is not None and _fills_pages(keys, page_table, positions):
        keys = cache_ops.turned(keys, inv_freq, scaling)
    elif inv_freq is not None:
        keys, values, page_table = cache_ops.turned_pages(keys, values, page_table, inv_freq, scaling)
    return cache_attend(q, keys, values, page_table, positions, scale, window, softcap, sinks)


def with_recent(rows: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    """`qcompile::with_recent` of an empty cache: what comes is all there is."""
    del rows, slots
    return x


def attend_settled(
    q: Tensor, keys: Tensor, values: Tensor, exact_keys: Tensor, exact_values: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, first: int, recent: int, group: int,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_tables: Sequence[Tensor] | None = None, v_tables: Sequence[Tensor] | None = None,
    inv_freq: Tensor | None = None, scaling: float = 1.0, products: str | None = None,
) -> Tensor:  # fmt: skip
    """`qcompile::attend_settled` as if nothing had settled: what is learned does not make up for the rounding of old tokens."""
    del keys, values, page_table, k_form, v_form, first, recent, group, k_tables, v_tables, products
    if inv_freq is not None:
        exact_keys = ops.rope(exact_keys, *ops.rotary_table(positions, inv_freq, scaling, exact_keys.dtype))
    return attention(q, exact_keys, exact_values, positions >= 0, None, scale, causal=True, window=window, softcap=softcap, sinks=sinks)


def attend_ranked(
    q: Tensor, keys: Tensor, values: Tensor, marks: Tensor, saliency: Tensor, exact_keys: Tensor, exact_values: Tensor, slots: Tensor,
    page_table: Tensor, positions: Tensor, k_form: str, v_form: str, first: int, recent: int, group: int, scale: float, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`qcompile::attend_ranked` as if nothing had settled."""
    del slots
    settled = (page_table, positions, k_form, v_form, first, recent, group, scale, window, softcap, sinks)
    return attend_settled(q, keys, values, exact_keys, exact_values, *settled), keys, values, marks, saliency


def cache_store(pages: Tensor, x: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """`qcompile::cache_store` to an empty cache, of vectors that come as numbers."""
    return cache_append(pages, pages, x, x, page_table, positions)[0]


def attend_rematerialized(
    q: Tensor, sources: Tensor, page_table: Tensor, positions: Tensor, form: str, *options: Any, **on_read: Any
) -> Tensor:  # fmt: skip
    """`qcompile::attend_rematerialized` over vectors that were rounded when they were stored, and are numbers here."""
    del form
    numbers = sources[page_table.long()].transpose(1, 2).flatten(2, 3)
    return rematerialize_ops.attend_over(q, numbers, positions, *options, **on_read)


def attend_settled_sources(
    q: Tensor, sources: Tensor, exact: Tensor, page_table: Tensor, positions: Tensor, form: str, first: int, recent: int, group: int,
    *options: Any, **on_read: Any,
) -> Tensor:  # fmt: skip
    """`qcompile::attend_settled_sources` as if nothing had settled."""
    del first, recent, group
    stored = cache_store(sources, exact, page_table, positions)
    return attend_rematerialized(q, stored, page_table, positions, form, *options, **on_read)


def straight_vectors(x: Tensor, form: str, tables: Sequence[Tensor] | None = None) -> Tensor:
    """What is read back of `qcompile::pack_vectors(x, form, tables)`, with the gradient of x."""
    with torch.no_grad():
        change = cache_ops.unpack_vectors(cache_ops.pack_vectors(x, form, tables), form, x.shape[-1], x.dtype, tables) - x
    return x + change


def _fills_pages(keys: Tensor, page_table: Tensor, positions: Tensor) -> bool:
    """Whether each row begins at position 0, has no padding and fills the page of its number."""
    rows, tokens = positions.shape
    if page_table.shape[1] != 1 or keys.shape[0] != rows or keys.shape[2] != tokens:
        return False
    return bool((positions == torch.arange(tokens)).all()) and bool((page_table[:, 0] == torch.arange(rows)).all())


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by two batched products, q [B, H, S, D], k and v [B, L, S, D]; queries that share keys are stacked."""
    batch, heads, tokens, size = q.shape
    shared = k.shape[1]
    narrow = torch.bfloat16 if tokens >= substitutes.LEAST_NARROW and substitutes.has_bfloat16_units() else torch.float32
    queries = (q * scale).to(narrow).reshape(batch * shared, -1, size)
    hidden = torch.full((tokens, tokens), -torch.inf, dtype=narrow).triu(1)
    scores = torch.bmm(queries, k.to(narrow).reshape(batch * shared, tokens, size).transpose(1, 2))
    weights = (scores.view(batch * shared, heads // shared, tokens, tokens) + hidden).softmax(-1).view_as(scores)
    mixed = torch.bmm(weights, v.to(narrow).reshape(batch * shared, tokens, v.shape[3]))
    return mixed.to(q.dtype).view(batch, heads, tokens, v.shape[3])


_PLAIN = ("rms_norm", "add_rms_norm", "rotary_table", "rope", "gated_activation", "moe_experts", "gather_last")

DIFFERENTIABLE: dict[Any, Any] = {
    **{getattr(torch.ops.qcompile, name).default: getattr(ops, name) for name in _PLAIN},
    torch.ops.qcompile.hadamard.default: hadamard_ops.hadamard,
    torch.ops.qcompile.attention.default: attention,
    torch.ops.qcompile.cache_append.default: cache_append,
    torch.ops.qcompile.cache_attend.default: cache_attend,
    torch.ops.qcompile.pack_vectors.default: straight_vectors,
    torch.ops.qcompile.cache_attend_packed.default: cache_attend_packed,
    torch.ops.qcompile.with_recent.default: with_recent,
    torch.ops.qcompile.settle.default: lambda pages, *_: pages,
    torch.ops.qcompile.retain.default: lambda rows, *_: rows,
    torch.ops.qcompile.attend_settled.default: attend_settled,
    torch.ops.qcompile.attend_ranked.default: attend_ranked,
    torch.ops.qcompile.cache_store.default: cache_store,
    torch.ops.qcompile.attend_rematerialized.default: attend_rematerialized,
    torch.ops.qcompile.attend_settled_sources.default: attend_settled_sources,
    torch.ops.aten.linear.default: linear,
}
"""Operator -> a function of the same arguments that passes gradients."""
