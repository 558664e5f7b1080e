"""Keys as signs of random projections and a norm, from which inner products are unbiased (QJL, arXiv:2406.03482)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.quant.packing import pack, packed_bytes, unpack
from qcompile.quant.vectors.parts import half_bytes, halves
from qcompile.quant.vectors.projection import project

_PATTERN = re.compile(r"qjl(?P<signs>[1-9]\d*)")
_HALF = 2
"""Bytes of a float16."""


@dataclass(frozen=True)
class QjlFormat:
    """Vectors [D] as m signs of projections `S · k` and the norm in float16; as text `qjl256`.

    `k ≈ sqrt(π/2) / m · ‖k‖ · Sᵀ sign(S · k)`: for any q the mean of `q · k` over random S is exact, and its variance falls as 1/m. It is
    large, at most π/2 · ‖q‖² ‖k‖² / m, so this suits what is only compared with queries. A vector takes `ceil(m / 8) + 2` bytes. Table
    `sketch`: S, float16 [1, m, D], the same for all heads. The paper's second sketch, of outlier channels alone, is not here.
    """

    signs: int
    tokens: ClassVar[int] = 1
    tables: ClassVar[tuple[str, ...]] = ("sketch",)

    def __str__(self) -> str:
        return f"qjl{self.signs}"

    def width(self, size: int) -> int:
        """W: bytes of a vector, whatever its `size`."""
        del size
        return packed_bytes(self.signs, 1) + _HALF

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The projections for vectors like x [N, L, D]; nothing of the data counts."""
        del importance
        return (sketch(self.signs, x.shape[-1]).to(torch.float16),)

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D] to uint8 [..., L, T, W]."""
        wide = x.to(torch.float32).contiguous()
        positive = (project(wide, tables[0].mT) > 0).to(torch.uint8).reshape(-1, self.signs)
        norms = wide.square().sum(-1, keepdim=True).sqrt()
        return torch.cat((pack(positive, 1).view(*x.shape[:-1], -1), half_bytes(norms)), dim=-1)

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Uint8 [..., L, T, W] to [..., L, T, D] as `dtype`."""
        del size
        body = packed_bytes(self.signs, 1)
        positive = unpack(packed[..., :body].reshape(-1, body), 1, self.signs).view(*packed.shape[:-1], self.signs)
        sums = project(2 * positive.to(torch.float32) - 1, tables[0])
        return (math.sqrt(math.pi / 2) / self.signs * halves(packed[..., body:]) * sums).to(dtype)


def sketch(signs: int, size: int, seed: int = 0) -> Tensor:
    """Random directions float32 [1, m, D], orthogonal `size` at a time, as the paper's code has them, which lowers the variance.

    Their length is the mean length of a Gaussian vector, `sqrt(2) Γ((D + 1) / 2) / Γ(D / 2)`: with it, not with sqrt(D), the mean of
    `s (s · k / |s · k|)` is that of Gaussian rows, and inner products are unbiased at any size.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(-(-signs // size), size, size, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(blocks).Q.mT.reshape(1, -1, size)[:, :signs]
    length = math.sqrt(2) * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))
    return (rows * length).float()


def read_qjl(text: str) -> QjlFormat | None:
    """`qjl256`, or None for anything else."""
    match = _PATTERN.fullmatch(text)
    return QjlFormat(int(match["signs"])) if match else None
