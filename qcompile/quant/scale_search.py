"""Scales per channel that make what reads the channels quantize well: candidates, and the error each would leave.

A scale s > 0 [n] divides the activations of n channels and multiplies the weight columns that read them, so the function stays and
only rounding sees it. Shapes: weight [N, K], inputs [tokens, K]; `channels` [K] says which of the n channels each column reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""Quantizes and dequantizes a matrix."""

_LEAST = 1e-5
"""Magnitudes are raised to this part of the largest: a dead channel would ask for a scale of 0."""


class Reader(Protocol):
    """A linear that reads the channels."""

    def error(self, scale: Tensor) -> float:
        """Energy of the error in its output over the output's energy, with the channels divided by `scale` [n]."""


@dataclass(frozen=True)
class WeightReader:
    """Only the weight is rounded: the second moment [K, K] of the inputs says all that matters about them.

    The error is `tr(D M Dᵀ) / tr(W M Wᵀ)` with `D = Q(W·s)/s - W`.
    """

    weight: Tensor
    moment: Tensor
    channels: Tensor
    rounding: Rounding

    def error(self, scale: Tensor) -> float:
        """See the class."""
        columns = scale[self.channels]
        difference = self.rounding(self.weight * columns) / columns - self.weight
        return _energy(difference, self.moment) / max(_energy(self.weight, self.moment), torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class ProductReader:
    """Weight and inputs are both rounded: `|Q(X/s) Q(W·s)ᵀ - X Wᵀ|² / |X Wᵀ|²` over sampled inputs X."""

    weight: Tensor
    inputs: Tensor
    channels: Tensor
    rounding: Rounding
    input_rounding: Rounding

    def error(self, scale: Tensor) -> float:
        """See the class."""
        columns = scale[self.channels]
        exact = self.inputs @ self.weight.T
        rounded = self.input_rounding(self.inputs / columns) @ self.rounding(self.weight * columns).T
        return float((rounded - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def _energy(weight: Tensor, moment: Tensor) -> float:
    return float(((weight @ moment) * weight).sum())


def normalized(scale: Tensor) -> Tensor:
    """The scale times a constant that puts its largest and smallest element at equal distance from 1, as AWQ does (arXiv:2306.00978)."""
    return scale / (scale.max() * scale.min()).sqrt()


def floored(magnitude: Tensor) -> Tensor:
    """Magnitudes [n] over the largest, the smallest raised so that powers and quotients stay finite; all ones if there is none."""
    largest = magnitude.max()
    return (magnitude / largest).clamp(min=_LEAST) if bool(largest > 0) else torch.ones_like(magnitude)


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """`max|x|^a / max|w|^(1-a)` (SmoothQuant, arXiv:2211.10438), normalized: [n] from the largest magnitudes [n] of both."""
    return normalized(floored(inputs) ** alpha / floored(weights) ** (1 - alpha))


def salience_scale(magnitude: Tensor, power: float) -> Tensor:
    """`mean|x|^a` (AWQ), normalized: [n]."""
    return normalized(floored(magnitude) ** power)


def best_scale(candidates: Iterable[Tensor], readers: Sequence[Reader]) -> tuple[Tensor | None, float]:
    """The candidate with the least error summed over all readers, and that error over the error without scales.

    None (and 1) if no candidate is better than no scale at all.
    """
    best: Tensor | None = None
    first = least = float("nan")
    for scale in candidates:
        if first != first:
            first = least = sum(reader.error(torch.ones_like(scale)) for reader in readers)
        error = sum(reader.error(scale) for reader in readers)
        if error < least:
            best, least = scale, error
    return best, least / first if first > 0 else 1.0


def per_channel(columns: Tensor, channels: Tensor, size: int) -> Tensor:
    """Magnitudes of the K columns of one reader as magnitudes of the channels, [size]: the largest of the columns that read each."""
    return torch.zeros(size, dtype=columns.dtype).scatter_reduce_(0, channels, columns, "amax")
