"""Vectors in their principal directions, each with as many bits as its variance deserves, under one gain per vector: `klt2`, `klt4`.

Transform coding (Huang and Schultheiss 1963; for keys and values CommVQ, arXiv:2506.18879, and KVQuant, arXiv:2401.18079, have its parts):
with tables mean m, weight a (square root of what an error in a channel costs), orthonormal directions U and their deviations s,

    z = ((x - m) · a) U / s,    x ≈ (g · level(z / g) · s) Uᵀ / a + m.

Bits are dealt out one by one where they take most from the expected error of a Gaussian; levels are Lloyd's, one set for each number of
bits. g is a power of 2^(1/16), kept in a byte: the one of a few around the root mean square of z that leaves the least error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.vectors.levels import lloyd_levels
from qcompile.quant.vectors.projection import project

_PATTERN = re.compile(r"klt(?P<bits>[1-8](\.\d+)?)")
_MOST = 8
_ERRORS = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.0006424, 0.000163, 0.0000412)
"""Of the best levels for a unit Gaussian at 0 to 8 bits (Max 1960)."""
_STEPS, _MIDDLE = 16, 128
"""Gains per factor of two, and the byte of a gain of 1."""
_TRIED = (-8, -4, 0, 4, 8, 12, 16, 24)
"""Gains tried, in steps from that of the root mean square; larger ones hold a vector's outliers."""
_BASIS_STEP = 127
"""Entries of orthonormal directions are kept in this part of one."""
_SAMPLES = 1 << 14
"""Numbers that levels are made from, at most twice as many."""
_LEAST_IMPORTANCE = 1e-4
"""Of a channel, relative to the mean."""


@dataclass(frozen=True)
class KltFormat:
    """`bits` per number of a vector on average, and a byte for its gain.

    Tables: `mean`, `weight`, `deviation` float16 [L, D], `basis` int8 [L, D, D] (columns are directions, in 1/127), `bits` uint8 [L, D],
    `levels` float16 [1, 510]: those of 1 bit, of 2 bits, and so on to 8.
    """

    bits: float
    tokens: ClassVar[int] = 1
    tables: ClassVar[tuple[str, ...]] = ("mean", "weight", "deviation", "basis", "bits", "levels")

    def __str__(self) -> str:
        return f"klt{self.bits:g}"

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers."""
        return -(-self._total(size) // 8) + 1

    def _total(self, size: int) -> int:
        return round(self.bits * size)

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The tables for vectors like x [N, L, D], of which an error in channel d counts `importance` [L, D]."""
        wide = x.double()
        mean = _half(wide.mean(0))
        weight = _half((importance.double() / importance.double().mean().clamp(min=1e-30)).clamp(min=_LEAST_IMPORTANCE).sqrt())
        scaled = (wide - mean.double()) * weight.double()
        directions = torch.linalg.eigh(torch.einsum("nld,nle->lde", scaled, scaled) / max(len(x), 1))[1]
        basis = (directions * _BASIS_STEP).round().to(torch.int8)
        z = torch.einsum("nld,lde->nle", scaled, basis.double() / _BASIS_STEP)
        deviation = _half(z.pow(2).mean(0).sqrt().clamp(min=1e-4))
        z = z / deviation.double()
        z = z / _gain(_gain_bytes(z))
        bits = torch.stack([_dealt(row.double().square(), self._total(x.shape[-1])) for row in deviation])
        levels = [_book(z[:, bits == count].flatten(), 1 << count) for count in range(1, _MOST + 1)]
        return mean, weight, deviation, basis, bits, _half(torch.cat(levels)).unsqueeze(0)

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D] to uint8 [..., L, T, W]: codes of the directions one after the other, low bits first, then the gain."""
        mean, weight, deviation, basis, bits, levels = tables
        scaled = (x.double() - mean.double().unsqueeze(-2)) * weight.double().unsqueeze(-2)
        z = scaled @ (basis.double() / _BASIS_STEP) / deviation.double().unsqueeze(-2)
        values, borders = _levels_of(bits, levels[0])
        cost = deviation.double().square().unsqueeze(-2)
        least: Tensor | None = None
        codes = gains = torch.empty(0)
        for tried in _TRIED:
            step = (_gain_bytes(z).int() + tried).clamp(0, 255)
            found = _nearest(z / _gain(step), borders)
            error = ((_look_up(values, found) * _gain(step) - z).square() * cost).sum(-1, keepdim=True)
            if least is None:
                least, codes, gains = error, found, step
            better = error < least
            least, codes, gains = torch.minimum(error, least), torch.where(better, found, codes), torch.where(better, step, gains)
        return torch.cat((_packed(codes, bits, self._total(x.shape[-1])), gains.to(torch.uint8)), dim=-1)

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Uint8 [..., L, T, W] to [..., L, T, D] as `dtype`."""
        mean, weight, deviation, basis, bits, levels = tables
        codes = _unpacked(packed[..., :-1], bits, self._total(size))
        values, _ = _levels_of(bits, levels[0])
        z = _look_up(values.float(), codes) * _gain(packed[..., -1:]).float() * deviation.float().unsqueeze(-2)
        x = project(z, (basis.float() / _BASIS_STEP).transpose(-1, -2)) / weight.float().unsqueeze(-2)
        return (x + mean.float().unsqueeze(-2)).to(dtype)


def _book(z: Tensor, count: int) -> Tensor:
    """Levels for the numbers z [N], from evenly many of them; zeros where no direction has that many bits."""
    return lloyd_levels(z[:: 1 + len(z) // _SAMPLES], count) if len(z) else torch.zeros(count)


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16)


def _gain_bytes(z: Tensor) -> Tensor:
    """The byte of the gain nearest to the root mean square of z [..., D]: [..., 1]."""
    size = z.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return (size.log2() * _STEPS).round().add(_MIDDLE).clamp(0, 255).to(torch.uint8)


def _gain(byte: Tensor) -> Tensor:
    return torch.exp2((byte.double() - _MIDDLE) / _STEPS)


def _dealt(variance: Tensor, total: int) -> Tensor:
    """`total` bits for directions of `variance` [D], at most 8 each: uint8 [D]."""
    errors = torch.tensor((*_ERRORS, _ERRORS[-1]), dtype=torch.float64)
    bits = torch.zeros(len(variance), dtype=torch.long)
    for _ in range(total):
        bits[(variance * (errors[bits] - errors[bits + 1])).argmax()] += 1
    return bits.to(torch.uint8)


def _levels_of(bits: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [L, D, M] of each direction, filled up with the last one, and the borders [L, D, M - 1] between them; no bits is 0."""
    count = (1 << bits.long()).unsqueeze(-1)
    place = torch.arange(int(count.max()), device=bits.device)
    index = (count - 2 + torch.minimum(place, count - 1)).clamp(min=0)
    values = torch.where(count == 1, 0.0, levels.double()[index])
    borders = (values[..., 1:] + values[..., :-1]) / 2
    return values, borders.masked_fill(place[1:] >= count, torch.inf)


def _nearest(z: Tensor, borders: Tensor) -> Tensor:
    """The codes of the levels next to z [..., L, T, D]."""
    lines = z.movedim(-2, -1).contiguous()  # [..., L, D, T]
    found = torch.searchsorted(borders.expand(*lines.shape[:-1], borders.shape[-1]).contiguous(), lines)
    return found.movedim(-1, -2)


def _look_up(values: Tensor, codes: Tensor) -> Tensor:
    """Values [L, D, M] at codes [..., L, T, D]."""
    lines = codes.movedim(-2, -1)
    return values.expand(*lines.shape[:-1], values.shape[-1]).gather(-1, lines).movedim(-1, -2)


def _bit_places(bits: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of the `total` bits of a vector its direction and its place in that one's code: [L, total]."""
    channel = torch.stack([torch.repeat_interleave(torch.arange(len(row), device=bits.device), row.long()) for row in bits])
    begin = bits.long().cumsum(-1) - bits.long()
    return channel, torch.arange(total, device=bits.device) - begin.gather(-1, channel)


def _packed(codes: Tensor, bits: Tensor, total: int) -> Tensor:
    """Codes [..., L, T, D] as uint8 [..., L, T, ceil(total / 8)]."""
    channel, place = _bit_places(bits, total)
    chosen = codes.gather(-1, channel.unsqueeze(-2).expand(*codes.shape[:-1], total))
    stream = torch.nn.functional.pad((chosen >> place.unsqueeze(-2)) & 1, (0, -total % 8))
    octets = stream.view(*stream.shape[:-1], -1, 8) << torch.arange(8, device=bits.device)
    return octets.sum(-1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: Tensor, total: int) -> Tensor:
    """Invert `_packed`: codes int64 [..., L, T, D]."""
    channel, place = _bit_places(bits, total)
    stream = (packed.long().unsqueeze(-1) >> torch.arange(8, device=bits.device)) & 1
    valued = stream.flatten(-2)[..., :total] << place.unsqueeze(-2)
    codes = torch.zeros(*packed.shape[:-1], bits.shape[-1], dtype=torch.long, device=packed.device)
    return codes.scatter_add_(-1, channel.unsqueeze(-2).expand(valued.shape), valued)


def read_klt(text: str) -> KltFormat | None:
    """`klt2`, `klt3.5`, or None for anything else.

    Raises:
        FormatError: for more than 8 bits.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    bits = float(match["bits"])
    if bits > _MOST:
        raise FormatError(f"cache format {text!r}: expected at most {_MOST} bits")
    return KltFormat(bits)
