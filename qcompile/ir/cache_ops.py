"""Keys and values of a cache below 16 bits: each token and head is one packed vector, so that pages stay what they are.

Shape letters: B batch, S tokens of this call, H query heads, L key/value heads, D head size, P pages, R tokens in a page,
W bytes of a packed vector: `D·bits/8` of codes, low bits first, then scale and least value in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.ops import cache_attend, define, working_dtype
from qcompile.quant.reference import pack, unpack

_TRAILER = 4
"""Bytes of a vector's scale and least value."""


def packed_width(size: int, bits: int) -> int:
    """W: bytes that a vector of `size` numbers takes at `bits` (2, 4 or 8) bits, scale and least value included."""
    return -(-size * bits // 8) + _TRAILER


def _fake_pack_vectors(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed_width(int(x.shape[-1]), bits)), dtype=torch.uint8)


@define("pack_vectors(Tensor x, int bits) -> Tensor", _fake_pack_vectors)
def pack_vectors(x: Tensor, bits: int) -> Tensor:
    """Quantize every vector x [..., D] asymmetrically to `bits` bits: uint8 [..., W].

    `x ≈ least + code · scale` with `scale = (max - min) / (2^bits - 1)`; scale and least value are rounded to float16 first, so a
    number is at most half a step (and what float16 adds) away (QServe, arXiv:2405.04532: per token and head).
    """
    wide = x.to(torch.float32)
    levels = (1 << bits) - 1
    least = wide.amin(-1, keepdim=True).to(torch.float16)
    step = ((wide.amax(-1, keepdim=True) - least.float()) / levels).clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16)
    codes = ((wide - least.float()) / step.float()).round().clamp(0, levels).to(torch.uint8)
    packed = pack(codes.flatten(0, -2), bits).view(*x.shape[:-1], -1)
    return torch.cat((packed, step.view(torch.uint8), least.view(torch.uint8)), dim=-1)


def unpack_vectors(packed: Tensor, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """Invert `pack_vectors`: uint8 [..., W] to [..., D] as `dtype`."""
    body = packed[..., :-_TRAILER].flatten(0, -2).contiguous()
    codes = unpack(body, bits, size).view(*packed.shape[:-1], size)
    trailer = packed[..., -_TRAILER:].contiguous().view(torch.float16).to(torch.float32)
    return (codes.to(torch.float32) * trailer[..., :1] + trailer[..., 1:]).to(dtype)


def _fake_attend_packed(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


@define(
    "cache_attend_packed(Tensor q, Tensor keys, Tensor values, Tensor page_table, Tensor positions, int bits, float scale, int "
    "window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    _fake_attend_packed,
)
def cache_attend_packed(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, positions: Tensor,
    bits: int, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`cache_attend` of q [B, H, S, D] over packed keys and values uint8 [P, L, R, W], which are unpacked first."""
    longest = max(1, int(positions.max()) + 1) if positions.numel() else 1
    pages = page_table.long()[:, : max(1, -(-longest // keys.shape[2]))]
    used, place = pages.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    work = working_dtype(q.dtype)
    k, v = (unpack_vectors(state[used], bits, q.shape[3], work) for state in (keys, values))
    return cache_attend(q, k, v, place, positions, scale, window, softcap, sinks)
