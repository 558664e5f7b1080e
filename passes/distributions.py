"""How values are distributed: a histogram, the largest magnitude of each channel, and how far a row's channels stand out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 64
CHANNELS = 128
"""Maxima that are kept at most: of more channels, runs of neighbours share one."""
_ELEMENTS = 1 << 20
"""Of a weight that are looked at: of larger ones, evenly spaced rows."""


@dataclass(frozen=True)
class Moments:
    """Of one value, averaged over tokens (of a weight: over output channels).

    Attributes:
        peak: max|x| / rms(x) of a token's channels: at least 1, at most the root of their number, 3.2 for 576 Gaussian ones.
        kurtosis: mean(x⁴) / mean(x²)²: 3 for a Gaussian, the number of channels if only one is not 0.
    """

    peak: float
    kurtosis: float


@dataclass(frozen=True)
class Distribution:
    """Of rows [tokens or output channels, K].

    Attributes:
        low: where the first of `counts` begins: the smallest value.
        high: where the last ends: the largest.
        counts: values in each of `BINS` equal parts of that range.
        channel_max: the largest magnitude of each channel, or of each run of `ceil(K / CHANNELS)` neighbours.
        moments: of a row's channels, averaged over rows.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    channel_max: tuple[float, ...]
    moments: Moments


class MomentSums:
    """Adds up the moments of rows as they come."""

    def __init__(self) -> None:
        """Start with no rows."""
        self._rows, self._peak, self._kurtosis = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, K]; those of zeros alone say nothing."""
        square = rows.square().mean(-1)
        rows, square = rows[square > 0], square[square > 0]
        self._rows += len(rows)
        self._peak += float((rows.abs().amax(-1) / square.sqrt()).sum(dtype=torch.float64))
        self._kurtosis += float((rows.square().square().mean(-1) / square.square()).sum(dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        """Their means; NaN where no row has anything but zeros."""
        count = self._rows or float("nan")
        return Moments(self._peak / count, self._kurtosis / count)


def distribution(rows: Tensor, moments: Moments | None = None) -> Distribution:
    """The distribution of rows [n, K], with their moments where they are known already; what is not finite counts in maxima only."""
    rows = rows.detach().float()
    if moments is None:
        sums = MomentSums()
        sums.add(rows)
        moments = sums.moments
    finite = rows[torch.isfinite(rows)] if not bool(torch.isfinite(rows).all()) else rows
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    counts = torch.histc(finite, BINS, low, high) if high > low else torch.tensor([float(finite.numel()), *[0.0] * (BINS - 1)])
    return Distribution(low, high, tuple(int(count) for count in counts), _channel_max(rows), moments)


def weight_distribution(weight: Tensor) -> Distribution:
    """The distribution of a matrix [N, K] or of filters [N, C, ...], taken as [N, C·...]."""
    rows = weight.reshape(weight.shape[0], -1)
    return distribution(rows[:: -(-rows.numel() // _ELEMENTS)])


def _channel_max(rows: Tensor) -> tuple[float, ...]:
    if not len(rows):
        return ()
    largest = rows.abs().amax(0)
    run = -(-len(largest) // CHANNELS)
    return tuple(float(part.max()) for part in torch.split(largest, run))
