"""What uniform codes lose is given back by a few directions for many tokens and by outliers kept aside (GEAR, arXiv:2403.05527)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.vector_format import VectorFormat, uniform_format
from qcompile.quant.vectors.parts import OUTLIER_BYTES, half_bytes, halves, largest, pack_outliers, put_back, require_outliers

_PATTERN = re.compile(r"gear(?P<tokens>[1-9]\d*)( r(?P<rank>[1-9]\d*))?( s(?P<outliers>[1-9]\d*))? (?P<inner>\S.*)")
_HALF = 2
"""Bytes of a float16."""


@dataclass(frozen=True)
class GearFormat:
    """A group of t vectors [t, D] as `inner + left · right + outliers`; as text `gear64 r2 s1 int2 t64 asym`.

    The s numbers of a vector farthest from the median of those that share a scale with them are kept aside, exact to float16, with the
    median in their place; `inner` rounds the rest, and left [t, r], right [r, D], float16, are the r largest singular directions of what
    it loses. A vector takes its bytes in `inner`, then `3·s` for outliers, `2·r` for its row of left, and `ceil(2·r·D / t)` of right,
    which lies over the vectors of its group.

    Attributes:
        inner: what is rounded; its own group of tokens divides t.
        tokens: t.
        rank: r.
        outliers: s.
    """

    inner: VectorFormat
    tokens: int
    rank: int = 0
    outliers: int = 0
    tables: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        rank, outliers = f" r{self.rank}" if self.rank else "", f" s{self.outliers}" if self.outliers else ""
        return f"gear{self.tokens}{rank}{outliers} {self.inner}"

    def _share(self, size: int) -> int:
        """Bytes of right that each vector holds."""
        return -(-_HALF * self.rank * size // self.tokens)

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers.

        Raises:
            FormatError: for a rank that a group does not have, too many outliers, or what `inner` refuses.
        """
        require_outliers(self.outliers, size, str(self))
        if self.rank > min(self.tokens, size):
            raise FormatError(
                f"cache format {self}: expected a rank of at most the tokens and the head size, got {self.rank} of {self.tokens} x {size}; "
                "choose a smaller one"
            )
        return self.inner.width(size) + OUTLIER_BYTES * self.outliers + _HALF * self.rank + self._share(size)

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """No tables: a group holds its own directions."""
        del x, importance
        return ()

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., T, D], T a multiple of t, to uint8 [..., T, W]."""
        del tables
        size = x.shape[-1]
        groups = x.to(torch.float32).reshape(-1, self.tokens, size)
        shares_scale = -2 if self.inner.tokens > 1 else -1
        median = groups.median(shares_scale, keepdim=True).values.expand_as(groups)
        aside = largest((groups - median).abs(), self.outliers)
        filled = groups.scatter(-1, aside, median.gather(-1, aside))
        body = self.inner.encode(filled)
        left, right = self._directions((filled - self.inner.decode(body, size)).scatter_(-1, aside, 0))
        spread = half_bytes(right).flatten(1)
        spread = torch.nn.functional.pad(spread, (0, self.tokens * self._share(size) - spread.shape[1])).view(len(groups), self.tokens, -1)
        packed = torch.cat((body, pack_outliers(groups, aside), half_bytes(left), spread), dim=-1)
        return packed.view(*x.shape[:-1], self.width(size))

    def _directions(self, lost: Tensor) -> tuple[Tensor, Tensor]:
        """Left [N, t, r] and right [N, r, D] of the largest singular values of lost [N, t, D], which they share evenly."""
        if not self.rank:
            return lost[..., :0], lost[:, :0]
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        root = values[:, : self.rank].sqrt()
        return left[..., : self.rank] * root.unsqueeze(1), right[:, : self.rank] * root.unsqueeze(2)

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Invert `encode`: uint8 [..., T, W] to [..., T, D] as `dtype`."""
        del tables
        groups = packed.reshape(-1, self.tokens, packed.shape[-1])
        lengths = [self.inner.width(size), OUTLIER_BYTES * self.outliers, _HALF * self.rank, self._share(size)]
        body, outliers, left, spread = torch.split(groups, lengths, dim=-1)
        values = self.inner.decode(body, size)
        right = halves(spread.flatten(1)[:, : _HALF * self.rank * size]).view(len(groups), self.rank, size)
        for column, row in zip(halves(left).unbind(-1), right.unbind(1), strict=True):  # one order of summation, whatever the shape
            values = values + column.unsqueeze(-1) * row.unsqueeze(1)
        return put_back(values, outliers).view(*packed.shape[:-1], size).to(dtype)


def read_gear(text: str) -> GearFormat | None:
    """`gear64 r2 s1 int2 t64 asym`, or None for anything else.

    Raises:
        FormatError: for what is not uniform inside, or tokens that do not make up whole groups of it.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    inner, tokens = uniform_format(match["inner"]), int(match["tokens"])
    if tokens % inner.tokens:
        raise FormatError(f"cache format {text!r}: expected a multiple of the {inner.tokens} tokens of {inner}, got gear{tokens}")
    return GearFormat(inner, tokens, int(match["rank"] or 0), int(match["outliers"] or 0))
