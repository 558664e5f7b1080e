"""Vectors by their leading principal directions: an orthogonal change of basis, cut.

MatryoshkaKV (arXiv:2410.14731) and CSKV (arXiv:2409.10593) train their projections further; these are where they begin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.vector_format import VectorFormat, uniform_format
from qcompile.quant.vectors.projection import project

_PATTERN = re.compile(r"pca(?P<rank>[1-9]\d*(/[1-9]\d*)?) (?P<inner>\S.*)")


@dataclass(frozen=True)
class PcaFormat:
    """Vectors [D] as r coordinates in another format: `pca48 int4 g48 sym` for r = 48, `pca3/4 int4 g16 sym` for r = 3/4 · D.

    `x ≈ mean + basis · coordinates` with `coordinates = basisᵀ · (x - mean)`, of which no basis of r directions leaves a smaller squared
    error over the calibration data. A vector takes the bytes of r numbers in `inner`. Tables `basis` float16 [L, D, r], of which the
    columns are orthonormal to float16, and `mean` float16 [L, D].
    """

    rank: Fraction
    inner: VectorFormat
    tables: ClassVar[tuple[str, ...]] = ("basis", "mean")

    def __str__(self) -> str:
        return f"pca{self.rank} {self.inner}"

    @property
    def tokens(self) -> int:
        """t: as many as the coordinates' format encodes together."""
        return self.inner.tokens

    def directions(self, size: int) -> int:
        """R: of vectors of `size` numbers; a rank below 1 is a share of the size, rounded up.

        Raises:
            FormatError: where there are not so many.
        """
        found = -(-self.rank.numerator * size // self.rank.denominator) if self.rank < 1 else int(self.rank)
        if found > size:
            raise FormatError(
                f"cache format {self}: expected a rank of at most the head size, got {found} of {size}; choose a smaller one, or a "
                f"share such as 'pca3/4 {self.inner}'"
            )
        return found

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers.

        Raises:
            FormatError: for a rank above the head size, or what the coordinates' format refuses.
        """
        return self.inner.width(self.directions(size))

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The leading eigenvectors of the covariance of x [N, L, D], head by head, and the means."""
        del importance
        mean = x.double().mean(0).to(torch.float16)
        centred = (x.double() - mean.double()).transpose(0, 1)
        directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(-1)
        return directions[..., : self.directions(x.shape[-1])].to(torch.float16).contiguous(), mean

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D] to uint8 [..., L, T, W]."""
        basis, mean = tables
        return self.inner.encode(project(x.to(torch.float32) - mean.float().unsqueeze(-2), basis))

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Uint8 [..., L, T, W] to [..., L, T, D] as `dtype`."""
        basis, mean = tables
        coordinates = self.inner.decode(packed, self.directions(size))
        return (project(coordinates, basis.mT) + mean.float().unsqueeze(-2)).to(dtype)


def read_pca(text: str) -> PcaFormat | None:
    """`pca48 int4 g48 sym` or `pca3/4 int4 g16 sym`, or None for anything else.

    Raises:
        FormatError: for coordinates in a format that is not uniform, or a rank between two numbers.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    rank = Fraction(match["rank"])
    if rank > 1 and rank.denominator > 1:
        raise FormatError(f"cache format {text!r}: expected a rank, or a share of the head size below 1, got {rank}")
    return PcaFormat(rank, uniform_format(match["inner"]))
