"""Caches of what keys and values are made from: both are projected anew whenever they are read (XQuant, arXiv:2508.10395).

Shape letters: B batch, S tokens of this call, T tokens of a sequence, H query heads, L key/value heads, D head size, K numbers that a
token's keys and values are made from, P pages, R tokens in a page, W bytes of a packed vector, N rows of unsettled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.cache_ops import unpack_vectors
from qcompile.ir.ops import define, masked_attention, rope, rotary_table, slots, working_dtype
from qcompile.ir.retention_ops import POLICY, as_stored, sequences, visible
from qcompile.quant.retention import Retention


def _store(pages: Tensor, x: Tensor, page_table: Tensor, positions: Tensor) -> None:
    real = positions >= 0
    page, row = slots(page_table, positions.clamp(min=0), pages.shape[2])
    pages[page[real], :, row[real]] = x.transpose(1, 2)[real].to(pages.dtype)


@define("cache_store(Tensor pages, Tensor x, Tensor page_table, Tensor positions) -> Tensor", lambda pages, *_: torch.empty_like(pages))
def cache_store(pages: Tensor, x: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """`cache_append` of one kind of vector: pages [P, L, R, W] with x [B, L, S, W] stored at `positions` [B, S], -1 for padding."""
    pages = pages.clone()
    _store(pages, x, page_table, positions)
    return pages


@define("cache_store_(Tensor(a!) pages, Tensor x, Tensor page_table, Tensor positions) -> ()", lambda *_: None)
def cache_store_(pages: Tensor, x: Tensor, page_table: Tensor, positions: Tensor) -> None:
    """`cache_store` in place."""
    _store(pages, x, page_table, positions)


_MAKING = "Tensor? k_bias=None, Tensor? v_bias=None, Tensor? inv_freq=None, float scaling=1.0"
"""What keys and values are made with besides weights."""


def _fake_attend_rematerialized(
    q: Tensor, sources: Tensor, page_table: Tensor, positions: Tensor, form: str, k_weight: Tensor, v_weight: Tensor,
    *_: object, **__: object,
) -> Tensor:  # fmt: skip
    del sources, page_table, positions, form
    return _fake_out(q, k_weight, v_weight)


def _fake_out(q: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    size = v_weight.shape[0] * q.shape[3] // k_weight.shape[0]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], size)).transpose(1, 2)


@define(
    "attend_rematerialized(Tensor q, Tensor sources, Tensor page_table, Tensor positions, str form, Tensor k_weight, Tensor v_weight, "
    f"float scale, int window=0, float softcap=0.0, Tensor? sinks=None, {_MAKING}) -> Tensor",
    _fake_attend_rematerialized,
)
def attend_rematerialized(
    q: Tensor, sources: Tensor, page_table: Tensor, positions: Tensor, form: str, k_weight: Tensor, v_weight: Tensor,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_bias: Tensor | None = None, v_bias: Tensor | None = None, inv_freq: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """Attention of q [B, H, S, D] over keys `turn(x k_weightᵀ + k_bias)` and values `x v_weightᵀ + v_bias` of stored x [K].

    sources uint8 [P, 1, R, W] holds x packed in `form`; k_weight, v_weight [L·D, K], k_bias, v_bias [L·D]. With `inv_freq` [D/2] keys are
    turned to the positions of their tokens (`scaling` as for `rotary_table`). Each row of the batch is computed on its own, over its real
    tokens. Options as `cache_attend`; a padding query gives 0.
    """
    work = working_dtype(q.dtype)
    numbers = q.new_zeros(q.shape[0], 1, max(1, int(positions.max()) + 1) if positions.numel() else 1, k_weight.shape[1], dtype=work)
    for row, last in enumerate(positions.amax(1).tolist() if positions.numel() else ()):
        if last >= 0:
            pages = sources[page_table[row, : last // sources.shape[2] + 1].long(), 0].flatten(0, 1)[: last + 1]
            numbers[row, 0, : last + 1] = unpack_vectors(pages, form, k_weight.shape[1], work)
    return attend_over(q, numbers, positions, k_weight, v_weight, scale, window, softcap, sinks, k_bias, v_bias, inv_freq, scaling)


def attend_over(
    q: Tensor, sources: Tensor, positions: Tensor, k_weight: Tensor, v_weight: Tensor,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_bias: Tensor | None = None, v_bias: Tensor | None = None, inv_freq: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """`attend_rematerialized` over numbers x [B, 1, T, K] of the positions 0 to T - 1, without pages."""
    work, heads = working_dtype(q.dtype), k_weight.shape[0] // q.shape[3]
    result = [q.new_zeros(q.shape[2], q.shape[1], v_weight.shape[0] // heads) for _ in range(q.shape[0])]
    for row, places in enumerate(positions):
        real = (places >= 0).nonzero().squeeze(-1)
        if not real.numel():
            continue
        x, mine = sources[row, 0, : int(places.max()) + 1].to(work), places[real].unsqueeze(1)
        column = torch.arange(len(x), device=q.device)
        k, v = _made(x, column, heads, (k_weight, v_weight), (k_bias, v_bias), inv_freq, scaling)
        keep = (column <= mine) & (column > mine - window) if window else column <= mine
        queries = q[row : row + 1, :, real].contiguous()
        mixed = masked_attention(queries, k, v, keep[None, None], None, scale, softcap, sinks)
        result[row] = result[row].index_put((real,), mixed[0].transpose(0, 1))
    return torch.stack(result).transpose(1, 2)


def _made(
    x: Tensor, places: Tensor, heads: int, weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None],
    inv_freq: Tensor | None, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys, turned to their positions `places` [T], and values [1, L, T, D] of numbers x [T, K]."""
    k, v = (
        functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).view(1, len(x), heads, -1).transpose(1, 2)
        for weight, bias in zip(weights, biases, strict=True)
    )
    return k if inv_freq is None else rope(k, *rotary_table(places.unsqueeze(0), inv_freq, scaling, k.dtype)), v


def _fake_attend_settled_sources(
    q: Tensor, sources: Tensor, exact: Tensor, page_table: Tensor, positions: Tensor, form: str, first: int, recent: int, group: int,
    k_weight: Tensor, v_weight: Tensor, *_: object, **__: object,
) -> Tensor:  # fmt: skip
    del sources, exact, page_table, positions, form, first, recent, group
    return _fake_out(q, k_weight, v_weight)


@define(
    "attend_settled_sources(Tensor q, Tensor sources, Tensor exact, Tensor page_table, Tensor positions, str form, "
    f"{POLICY}, Tensor k_weight, Tensor v_weight, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, {_MAKING}) -> Tensor",
    _fake_attend_settled_sources,
)
def attend_settled_sources(
    q: Tensor, sources: Tensor, exact: Tensor, page_table: Tensor, positions: Tensor, form: str, first: int, recent: int, group: int,
    k_weight: Tensor, v_weight: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_bias: Tensor | None = None, v_bias: Tensor | None = None, inv_freq: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """`attend_rematerialized` where each query sees x as it stands at its own step: tokens that have settled by then packed.

    sources uint8 [P, 1, R, W] is what `settle` gave, exact [B, 1, N + S, K] what `with_recent` gave (`qcompile/ir/retention_ops.py`).
    Only what some query sees is projected.
    """
    policy, heads = Retention(first, recent, group), k_weight.shape[0] // q.shape[3]
    result = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v_weight.shape[0] // heads, dtype=q.dtype, device=q.device)
    for sequence in sequences(positions):
        row = sequence.row
        stored = as_stored(sources, exact[row], page_table[row], form, None, sequence, policy, q.dtype)[0, 0]
        keep = visible(policy, sequence, window, q.device)
        seen = keep[0, 0].any(0).nonzero().squeeze(-1)
        k, v = _made(stored[seen], seen % sequence.end, heads, (k_weight, v_weight), (k_bias, v_bias), inv_freq, scaling)
        queries = q[row : row + 1, :, sequence.places].contiguous()
        mixed = masked_attention(queries, k, v, keep[..., seen], None, scale, softcap, sinks)
        result[row, sequence.places] = mixed[0].transpose(0, 1)
    return result.transpose(1, 2)
