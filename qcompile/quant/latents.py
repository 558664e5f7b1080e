"""One low-rank vector that both keys and values are made from: few numbers to cache where heads are shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.quant.hadamard import fast_hadamard, mixing_matrix
from qcompile.quant.vector_format import VectorForm

_SAMPLES = 512


@dataclass(frozen=True)
class Latent:
    """`k_weight x ≈ keys z` and `v_weight x ≈ values z` with `z = down x` of r numbers.

    Attributes:
        down: [r, K].
        keys: [Nk, r].
        values: [Nv, r].
        lost: share of the keys' and values' mean square that r numbers leave out.
    """

    down: Tensor
    keys: Tensor
    values: Tensor
    lost: float


def shared_latent(k_weight: Tensor, v_weight: Tensor, moment: Tensor | None, form: VectorForm) -> Latent:
    """The latent of k_weight [Nk, K] and v_weight [Nv, K]: the SVD of both, one above the other (XQuant, arXiv:2508.10395, takes two).

    `moment` [K, K] is the second moment of x; None takes it to be the identity. Keys and values count by their shares of their own mean
    squares. The rank is the least, in whole groups of the form, at which what is left out is at most what rounding to the form costs,
    measured on normal vectors. Each group is mixed by a Hadamard matrix, so that no number of it stands out.
    """
    weights = [weight.double() for weight in (k_weight, v_weight)]
    moment = torch.eye(k_weight.shape[1]).double() if moment is None else moment.double()
    norms = [(weight @ moment * weight).sum().clamp(min=torch.finfo(torch.float64).tiny).sqrt() for weight in weights]
    stacked = torch.cat([weight / norm for weight, norm in zip(weights, norms, strict=True)])
    found = torch.linalg.eigh(stacked @ moment @ stacked.T)
    variances, basis = found.eigenvalues.flip(0).clamp(min=0), found.eigenvectors.flip(1)
    full = min(stacked.shape)
    group = getattr(form, "group", -1)
    group = group if 0 < group <= full else full if full < 8 else 8
    ranks = [*range(group, full, group), full]
    budget = _rounding(form, _mixed(basis[:, :full], group), basis[:, :full], variances[:full])
    lost = {rank: float(variances[rank:].sum()) for rank in ranks}
    rank = next((rank for rank in ranks if lost[rank] <= budget), full)
    kept = _mixed(basis[:, :rank], group)
    keys, values = norms[0] * kept[: len(k_weight)], norms[1] * kept[len(k_weight) :]
    return Latent((kept.T @ stacked).float(), keys.float(), values.float(), lost[rank] / float(variances.sum()))


def _mixed(basis: Tensor, group: int) -> Tensor:
    """The columns of an orthonormal basis [N, r], each whole group of them mixed among themselves."""
    whole = basis.shape[1] // group * group
    return torch.cat((fast_hadamard(basis[:, :whole], mixing_matrix(group), group), basis[:, whole:]), dim=1)


def _rounding(form: VectorForm, mixed: Tensor, basis: Tensor, variances: Tensor) -> float:
    """The mean squared error of vectors of these variances along `basis` that are stored, mixed, in a form."""
    generator = torch.Generator().manual_seed(0)
    samples = -(-_SAMPLES // form.tokens) * form.tokens
    drawn = torch.randn(samples, len(variances), generator=generator, dtype=torch.float64) * variances.sqrt()
    stored = drawn @ (basis.T @ mixed)
    read = form.decode(form.encode(stored.unsqueeze(0)), stored.shape[1], torch.float64)[0]
    return float((read - stored).square().sum(1).mean())
