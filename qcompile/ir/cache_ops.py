"""Keys and values of a cache below 16 bits: each token and head is one packed vector, so that pages stay what they are.

Shape letters: B batch, S tokens of this call, H query heads, L key/value heads, D head size, P pages, R tokens in a page,
W bytes of a packed vector (`quant/vector_format.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.ops import cache_attend, define, working_dtype
from qcompile.quant.vector_format import vector_format


def _fake_pack_vectors(x: Tensor, form: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], vector_format(form).width(int(x.shape[-1]))), dtype=torch.uint8)


@define("pack_vectors(Tensor x, str form) -> Tensor", _fake_pack_vectors)
def pack_vectors(x: Tensor, form: str) -> Tensor:
    """Quantize every vector x [..., D] to the format `form`: uint8 [..., W] (per token and head, as QServe, arXiv:2405.04532)."""
    return vector_format(form).encode(x)


def unpack_vectors(packed: Tensor, form: str, size: int, dtype: torch.dtype) -> Tensor:
    """Invert `pack_vectors`: uint8 [..., W] to [..., D] as `dtype`."""
    return vector_format(form).decode(packed, size, dtype)


def _fake_attend_packed(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


@define(
    "cache_attend_packed(Tensor q, Tensor keys, Tensor values, Tensor page_table, Tensor positions, str k_form, "
    "str v_form, float scale, int window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    _fake_attend_packed,
)
def cache_attend_packed(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`cache_attend` of q [B, H, S, D] over packed keys and values uint8 [P, L, R, W], which are unpacked first."""
    longest = max(1, int(positions.max()) + 1) if positions.numel() else 1
    pages = page_table.long()[:, : max(1, -(-longest // keys.shape[2]))]
    used, place = pages.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    work = working_dtype(q.dtype)
    k, v = (unpack_vectors(state[used], form, q.shape[3], work) for state, form in ((keys, k_form), (values, v_form)))
    return cache_attend(q, k, v, place, positions, scale, window, softcap, sinks)
