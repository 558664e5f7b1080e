"""How far two sets of outputs are apart: the largest error, the noise, the divergence of distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256
"""Tokens whose log-probabilities are held in float64 at a time."""


@dataclass(frozen=True)
class Effect:
    """What a pass changed at the outputs; the fields are those of `PassRecord`."""

    max_error: float
    sqnr_db: float | None = None
    kl: float | None = None
    total_sqnr_db: float | None = None
    total_kl: float | None = None


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max|a-b| / max|b| over the outputs that both have (a cache adds outputs behind the logits); NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=False):
        if a.shape != b.shape:
            return float("inf")
        difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        scale = b.double().abs().max().item() if b.numel() else 1.0
        error = difference / scale if scale else difference
        worst = max(worst, error if error == error else float("inf"))
    return worst


def sqnr(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """10·log10 of an output's energy over that of its error, in dB; of several outputs the mean of error / energy counts.

    None where there is nothing to compare, no error, or no number that is finite.
    """
    shares = [noise(a, b) for a, b in _alike(got, expected)]
    mean = sum(shares) / len(shares) if shares else 0.0
    return -10 * math.log10(mean) if 0 < mean < math.inf else None


def noise(got: Tensor, expected: Tensor) -> float:
    """Energy of the error over that of what was expected; the energy of the error itself where that is nothing."""
    energy = float(expected.double().square().sum())
    return float((got.double() - expected.double()).square().sum()) / (energy or 1.0)


def _alike(got: Sequence[Tensor], expected: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = zip(got, expected, strict=False)
    return ((a, b) for a, b in pairs if a.shape == b.shape and a.is_floating_point() and b.numel())


def divergence_per_token(got: Tensor, expected: Tensor, real: Tensor | None) -> float | None:
    """Mean KL(expected ‖ got) in nats over the tokens that are `real` [B, S], of logits [B, S, V]; None where it is not finite."""
    rows = torch.ones(expected.shape[:-1], dtype=torch.bool) if real is None else real
    found, wanted = got[rows], expected[rows]
    total = 0.0
    for a, b in zip(torch.split(found, _ROWS), torch.split(wanted, _ROWS), strict=True):
        log_q, log_p = a.double().log_softmax(-1), b.double().log_softmax(-1)
        # What the distribution before excludes (-inf) contributes nothing: 0 · log 0 is 0.
        total += float(torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum())
    mean = total / max(1, len(wanted))
    return max(0.0, mean) if math.isfinite(mean) else None


def lost_numbers(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether an output holds NaN or infinity where it held a number."""
    return any(bool((~a.isfinite() & b.isfinite()).any()) for a, b in _alike(got, expected))
