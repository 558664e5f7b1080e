"""Non-uniform levels, per channel or per token, with outliers kept aside (KVQuant, arXiv:2401.18079)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.quant.packing import pack, packed_bytes, unpack
from qcompile.quant.vectors.levels import lloyd_levels, nearest_level
from qcompile.quant.vectors.parts import OUTLIER_BYTES, half_bytes, halves, largest, pack_outliers, put_back, require_outliers

_PATTERN = re.compile(r"nuq(?P<bits>[1-8]) (?P<kind>static|token)( s(?P<outliers>[1-9]\d*))?")
_SAMPLES = 1 << 19
"""Numbers that levels are made from."""
_PER_TOKEN = 4
"""Bytes of a token's scale and centre."""


@dataclass(frozen=True)
class NuqFormat:
    """Vectors [D] as codes of b bits into a codebook, `x ≈ centre + scale · levels[code]`; as text `nuq3 static s1`, `nuq3 token s1`.

    Static, for keys before positions: centre and scale are the calibrated mean and standard deviation of each channel. Per token, for
    values: they are the middle and half the range of the vector without its outliers. The s numbers farthest from the mean, in units of
    the scale, are kept aside and exact to float16. The levels are the best for the calibration data without outliers (k-means, weighted
    by what an error costs, in place of the paper's Fisher information). A vector takes `ceil(D·b / 8) + 3·s` bytes, and 4 more if per
    token: codes, low bits first, then scale and centre per token, then outliers and the bytes of their channels. Tables: `levels` float16
    [1, 2^b], and if static `scale`, `centre` float16 [L, D].

    Attributes:
        bits: b.
        is_static: whether centre and scale are calibrated per channel.
        outliers: s.
    """

    bits: int
    is_static: bool
    outliers: int = 0
    tokens: ClassVar[int] = 1

    def __str__(self) -> str:
        return f"nuq{self.bits} {'static' if self.is_static else 'token'}{f' s{self.outliers}' if self.outliers else ''}"

    @property
    def tables(self) -> tuple[str, ...]:
        """The codebook, and if static what a channel is like."""
        return ("levels", "scale", "centre") if self.is_static else ("levels",)

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers.

        Raises:
            FormatError: for more outliers than numbers, or channels that a byte cannot number.
        """
        require_outliers(self.outliers, size, str(self))
        return packed_bytes(size, self.bits) + (0 if self.is_static else _PER_TOKEN) + OUTLIER_BYTES * self.outliers

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """Levels, and per channel scale and centre, for vectors like x [N, L, D]; an error in channel d counts `importance` [L, D]."""
        wide = x.to(torch.float32)
        tables = self._channels(wide) if self.is_static else ()
        by_head = wide.transpose(0, 1).contiguous()
        outliers, scale, centre = self._frame(by_head, tables)
        z = (by_head - centre) / scale
        weights = importance.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1) * scale.square()
        weights = weights.expand_as(z).scatter(-1, outliers, 0)
        kept = weights.flatten().nonzero().squeeze(1)
        kept = kept[:: -(-len(kept) // _SAMPLES)]
        levels = lloyd_levels(z.flatten()[kept], 1 << self.bits, weights.flatten()[kept])
        return (levels.to(torch.float16).unsqueeze(0), *tables)

    def _channels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and centre [L, D] of the channels of x [N, L, D]; what is an outlier by them is left out, and they are taken again."""
        counted = torch.ones_like(x, dtype=torch.bool)
        scale, centre = _moments(x.double(), counted)
        if self.outliers:
            aside = largest(((x - centre.float()) / scale.float()).abs(), self.outliers)
            scale, centre = _moments(x.double(), counted.scatter(-1, aside, False))
        return scale, centre

    def _frame(self, x: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of x [..., L, T, D] the channels [..., T, s] of the outliers, and scale and centre, as they are stored, in float32."""
        if self.is_static:
            scale, centre = (table.float().unsqueeze(-2) for table in tables)
            return largest(((x - centre) / scale).abs(), self.outliers), scale, centre
        aside = largest((x - x.mean(-1, keepdim=True)).abs(), self.outliers)
        high = x.scatter(-1, aside, -torch.inf).amax(-1, keepdim=True)
        low = x.scatter(-1, aside, torch.inf).amin(-1, keepdim=True)
        return aside, _stored((high - low) / 2).float(), ((high + low) / 2).to(torch.float16).float()

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D] to uint8 [..., L, T, W]."""
        wide = x.to(torch.float32).contiguous()
        aside, scale, centre = self._frame(wide, tables[1:])
        codes = nearest_level((wide - centre) / scale, tables[0].view(-1))
        parts = [pack(codes.view(-1, x.shape[-1]), self.bits).view(*x.shape[:-1], -1)]
        if not self.is_static:
            parts.append(half_bytes(torch.cat((scale, centre), dim=-1)))
        return torch.cat((*parts, pack_outliers(wide, aside)), dim=-1)

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Uint8 [..., L, T, W] to [..., L, T, D] as `dtype`."""
        body = packed_bytes(size, self.bits)
        codes = unpack(packed[..., :body].reshape(-1, body), self.bits, size).view(*packed.shape[:-1], size)
        if self.is_static:
            scale, centre = (table.float().unsqueeze(-2) for table in tables[1:])
        else:
            scale, centre = torch.split(halves(packed[..., body : body + _PER_TOKEN]), 1, dim=-1)
            body += _PER_TOKEN
        values = centre + scale * tables[0].float().view(-1)[codes.long()]
        return put_back(values, packed[..., body:]).to(dtype)


def _moments(x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean float16 [L, D] of what is counted of x [N, L, D]."""
    number = counted.sum(0).clamp(min=1)
    mean = ((x * counted).sum(0) / number).to(torch.float16)
    return _stored((((x - mean) * counted).square().sum(0) / number).sqrt()), mean


def _stored(scale: Tensor) -> Tensor:
    """In float16, at least its least normal number: nothing is divided by 0."""
    return scale.clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16)


def read_nuq(text: str) -> NuqFormat | None:
    """`nuq3 static s1` or `nuq3 token`, or None for anything else."""
    match = _PATTERN.fullmatch(text)
    return NuqFormat(int(match["bits"]), match["kind"] == "static", int(match["outliers"] or 0)) if match else None
