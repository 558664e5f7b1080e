"""Keys and values of a cache below 16 bits: each token and head is one packed vector, so that pages stay what they are.

Shape letters: B batch, S tokens of this call, H query heads, L key/value heads, D head size, P pages, R tokens in a page,
W bytes of a packed vector (`quant/vector_format.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.ir.ops import cache_attend, define, rope, rotary_table, working_dtype
from qcompile.quant.vector_format import vector_format

ON_READ = "Tensor[]? k_tables=None, Tensor[]? v_tables=None, Tensor? inv_freq=None, float scaling=1.0, str? products=None"
"""What reading takes besides: the tables of forms that have them, and the frequencies of keys kept before positions."""


def _fake_pack_vectors(x: Tensor, form: str, tables: Sequence[Tensor] | None = None) -> Tensor:
    del tables
    return x.new_empty((*x.shape[:-1], vector_format(form).width(int(x.shape[-1]))), dtype=torch.uint8)


@define("pack_vectors(Tensor x, str form, Tensor[]? tables=None) -> Tensor", _fake_pack_vectors)
def pack_vectors(x: Tensor, form: str, tables: Sequence[Tensor] | None = None) -> Tensor:
    """Quantize every vector x [..., L, S, D] to the format `form`: uint8 [..., L, S, W] (per token and head, as QServe, arXiv:2405.04532).

    `tables` are the form's, made by its `calibrate`.
    """
    return vector_format(form).encode(x, tables or ())


def unpack_vectors(packed: Tensor, form: str, size: int, dtype: torch.dtype, tables: Sequence[Tensor] | None = None) -> Tensor:
    """Invert `pack_vectors`: uint8 [..., L, S, W] to [..., L, S, D] as `dtype`."""
    return vector_format(form).decode(packed, size, dtype, tables or ())


def turned(keys: Tensor, inv_freq: Tensor | None, scaling: float) -> Tensor:
    """Keys [B, L, T, D] of positions 0 to T - 1, kept before positions, as they are after them; unchanged without frequencies [D/2]."""
    if inv_freq is None:
        return keys
    places = torch.arange(keys.shape[2], device=keys.device).unsqueeze(0)
    return rope(keys, *rotary_table(places, inv_freq, scaling, keys.dtype))


def turned_pages(
    keys: Tensor, values: Tensor, page_table: Tensor, inv_freq: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each row's keys, turned by their positions, and values as one page, and the table of these: a page of one row is no other's then."""
    k, v = (part[page_table.long()].transpose(1, 2).flatten(2, 3) for part in (keys, values))
    return turned(k, inv_freq, scaling), v, torch.arange(len(page_table), device=keys.device).unsqueeze(1)


def _fake_attend_packed(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


@define(
    "cache_attend_packed(Tensor q, Tensor keys, Tensor values, Tensor page_table, Tensor positions, str k_form, "
    f"str v_form, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, {ON_READ}) -> Tensor",
    _fake_attend_packed,
)
def cache_attend_packed(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_tables: Sequence[Tensor] | None = None, v_tables: Sequence[Tensor] | None = None,
    inv_freq: Tensor | None = None, scaling: float = 1.0, products: str | None = None,
) -> Tensor:  # fmt: skip
    """`cache_attend` of q [B, H, S, D] over packed keys and values uint8 [P, L, R, W], which are unpacked first.

    With `inv_freq` [D/2] keys are kept before rotary positions, which are applied on reading (`scaling` as for `rotary_table`). With
    `products="fast"` a kernel may round what it multiplies codes with to 16 bits, those of a query or of weights under one exponent.
    """
    del products
    longest = max(1, int(positions.max()) + 1) if positions.numel() else 1
    pages = page_table.long()[:, : max(1, -(-longest // keys.shape[2]))]
    used, place = pages.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    work = working_dtype(q.dtype)
    parts = ((keys, k_form, k_tables), (values, v_form, v_tables))
    k, v = (unpack_vectors(state[used], form, q.shape[3], work, tables) for state, form, tables in parts)
    if inv_freq is not None:
        k, v, place = turned_pages(k, v, place, inv_freq, scaling)
    return cache_attend(q, k, v, place, positions, scale, window, softcap, sinks)
