"""Low-rank matrices that absorb what a quantizer would lose; W [N, K] ≈ rest + left · right with left [N, R], right [R, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.quant.format import QuantFormat
from qcompile.quant.reference import restore
from qcompile.quant.rounding.mse_clip import mse_clip

_ROUNDS = 3
_DAMPING = 0.01
_SPARE, _ITERATIONS = 8, 6


def absorb_weight(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest directions of the weight itself (SVDQuant, arXiv:2411.05007): left [N, R], right [R, K].

    The factors share the singular values evenly, so that both fit into 16 bits.
    """
    left, values, right = _largest(weight, min(rank, *weight.shape))
    share = values.sqrt()
    return left * share, right * share.unsqueeze(1)


def absorb_error(weight: Tensor, form: QuantFormat, rank: int, moment: Tensor | None, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """The `rank` largest directions of what rounding loses, in the metric of the second moment [K, K] of the inputs if given.

    Rounding what a branch leaves changes the error that the branch was fitted to, so the two are fitted in turn (LoftQ,
    arXiv:2310.08659) and the best pair is kept; the branch is never worse than none.
    """
    root = None if moment is None else _root(moment)
    best: tuple[Tensor, Tensor] | None = None
    rank = min(rank, *weight.shape)
    left, right = torch.zeros(weight.shape[0], rank), torch.zeros(rank, weight.shape[1])
    least = torch.inf
    for _ in range(_ROUNDS + 1):
        rest = weight - left @ right
        rounded = restore(mse_clip(rest, form, None if moment is None else moment.diagonal(), name=name), form, weight.shape[1])
        error = weight - rounded
        remaining = error - left @ right
        cost = float((remaining if root is None else remaining @ root[0]).square().sum())
        if cost < least:
            best, least = (left, right), cost
        if root is None:
            left, right = absorb_weight(error, rank)
        else:
            left, right = absorb_weight(error @ root[0], rank)
            right = right @ root[1]
    assert best is not None
    return best


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and vectors; by subspace iteration (arXiv:0909.4061) where that is much less work."""
    wanted = rank + _SPARE
    if 4 * wanted >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    basis = torch.randn(matrix.shape[1], wanted, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
    left, values, turned = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank], values[:rank], (turned @ basis.T)[:rank]


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of the damped second moment and its inverse, float32."""
    wide = moment.double()
    damped = wide + torch.eye(len(wide), dtype=torch.float64) * (_DAMPING * wide.diagonal().mean()).clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(damped)
    root = values.clamp(min=1e-30).sqrt()
    return ((vectors * root) @ vectors.T).float(), ((vectors / root) @ vectors.T).float()
