"""Scales per channel that make what reads the channels quantize well: candidates, and the error each would leave.

A scale s > 0 [n] divides the activations of n channels and multiplies the weight columns that read them, so the function stays and
only rounding sees it. Shapes: weight [N, K], inputs [tokens, K]; `channels` [K] says which of the n channels each column reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""Quantizes and dequantizes a matrix."""

_LEAST = 1e-5
"""Magnitudes are raised to this part of the largest: a dead channel would ask for a scale of 0."""


@dataclass(frozen=True)
class Reader:
    """A linear that reads the channels, and inputs X that it has read.

    Its error is `|Q(X/s) Q(W·s)ᵀ - X Wᵀ|² / |X Wᵀ|²`; without `input_rounding` only the weight is rounded.
    """

    weight: Tensor
    inputs: Tensor
    channels: Tensor
    rounding: Rounding
    input_rounding: Rounding | None = None

    @cached_property
    def outputs(self) -> Tensor:
        """Without rounding."""
        return self.inputs @ self.weight.T

    def error(self, scale: Tensor) -> float:
        """With the channels divided by `scale` [n]; columns that read none of them (-1) keep theirs."""
        columns = torch.cat((scale, torch.ones(1)))[self.channels]
        weight = self.rounding(self.weight * columns)
        if self.input_rounding is None:
            difference = self.inputs @ (weight / columns - self.weight).T
        else:
            difference = self.input_rounding(self.inputs / columns) @ weight.T - self.outputs
        return float(difference.square().sum() / self.outputs.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


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
