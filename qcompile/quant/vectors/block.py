"""Block floating point: numbers of a few bits that share a power of two, and channels in the order of their magnitude.

Accurate Block Quantization in LLMs with Outliers (K-sort), arXiv:2403.20137: an outlier takes the precision of those in its block, so
channels of like magnitude are put into the same block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.quant.packing import pack, packed_bytes, unpack
from qcompile.quant.vectors.parts import require_channels

_PATTERN = re.compile(r"bfp(?P<bits>[2-8])( g(?P<group>[1-9]\d*))?(?P<sorted> sorted)?")
_FRACTION = 23
"""Where the exponent of a float32 begins."""


@dataclass(frozen=True)
class BlockFormat:
    """Vectors [D] as signed mantissas of b bits and one exponent for g channels; as text `bfp4 g16`, `bfp4 g16 sorted`.

    `x ≈ (code - 2^(b-1)) · 2^(exponent - 127)`. The exponent is the largest magnitude's in float32 less b - 2, at least 1: the largest
    mantissa lies in [2^(b-2), 2^(b-1)) and is at most one step off (at the positive end of the range), any other at most half a step.
    A vector takes `ceil(D·b / 8) + D/g` bytes: codes, low bits first, then exponents. Table `order`, if sorted: uint8 [L, D], the channel
    that stands at each place.

    Attributes:
        bits: b, with the sign.
        group: g; a head size that it does not divide is one block, as for -1.
        is_sorted: whether channels are reordered.
    """

    bits: int
    group: int = -1
    is_sorted: bool = False
    tokens: ClassVar[int] = 1

    def __str__(self) -> str:
        return f"bfp{self.bits}{f' g{self.group}' if self.group > 0 else ''}{' sorted' if self.is_sorted else ''}"

    @property
    def tables(self) -> tuple[str, ...]:
        """`order` where channels are reordered."""
        return ("order",) if self.is_sorted else ()

    def blocks(self, size: int) -> int:
        """Blocks of a vector of `size` numbers."""
        return 1 if self.group == -1 or size % self.group else size // self.group

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers.

        Raises:
            FormatError: for more channels than a byte tells apart, if sorted.
        """
        if self.is_sorted:
            require_channels(size, str(self))
        return packed_bytes(size, self.bits) + self.blocks(size)

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The channels of each head from large to small by their norm over x [N, L, D], as the paper's by the rows of the projection."""
        del importance
        norms = x.double().square().sum(0)
        return (norms.argsort(dim=-1, descending=True, stable=True).to(torch.uint8),) if self.is_sorted else ()

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D] to uint8 [..., L, T, W]."""
        size = x.shape[-1]
        placed = x.to(torch.float32)
        if self.is_sorted:
            placed = placed.gather(-1, _places(tables[0], placed.shape))
        blocks = placed.reshape(-1, self.blocks(size), size // self.blocks(size))
        largest = blocks.abs().amax(-1)
        exponents = ((largest.view(torch.int32) >> _FRACTION) - (self.bits - 2)).clamp(min=1)
        half = 1 << (self.bits - 1)
        codes = (blocks / _power(exponents)).round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)
        packed = torch.cat((pack(codes.view(-1, size), self.bits), exponents.to(torch.uint8)), dim=-1)
        return packed.view(*x.shape[:-1], self.width(size))

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Uint8 [..., L, T, W] to [..., L, T, D] as `dtype`."""
        rows, body = packed.reshape(-1, packed.shape[-1]), packed_bytes(size, self.bits)
        codes = unpack(rows[:, :body].contiguous(), self.bits, size).to(torch.float32) - (1 << (self.bits - 1))
        exponents = rows[:, body:].to(torch.int32)
        values = (codes.view(*exponents.shape, -1) * _power(exponents)).view(*packed.shape[:-1], size)
        if self.is_sorted:
            values = torch.empty_like(values).scatter_(-1, _places(tables[0], values.shape), values)
        return values.to(dtype)


def _places(order: Tensor, shape: torch.Size) -> Tensor:
    """The order [L, D] for every vector of [..., L, T, D]."""
    return order.long().unsqueeze(-2).expand(shape)


def _power(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) as float32 [..., 1]; exact, for 1 to 254."""
    return (exponents.to(torch.int32) << _FRACTION).view(torch.float32).unsqueeze(-1)


def read_block(text: str) -> BlockFormat | None:
    """`bfp4 g16` or `bfp4 g16 sorted`, or None for anything else."""
    match = _PATTERN.fullmatch(text)
    return BlockFormat(int(match["bits"]), int(match["group"] or -1), match["sorted"] is not None) if match else None
