"""Non-uniform levels: the few numbers that stand for many with the least squared error, and the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100
_SETTLED = 1e-6
"""A round that lowers the error by a smaller share is the last one."""


def lloyd_levels(samples: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """The `count` levels, ascending float32, for which Σ weight · (sample - nearest level)² is locally least (Lloyd 1982).

    The better of two starts is kept: levels an even step apart over the range, and evenly many samples apart; so the result is never worse
    than uniform levels. Where there are no more distinct samples than levels the error is 0 and the largest sample is repeated.

    Args:
        samples: finite, [N], N at least 1.
        count: of levels.
        weights: of the samples [N], not negative; all the same by default.
    """
    ordered, order = samples.detach().flatten().double().sort(stable=True)
    weight = torch.ones_like(ordered) if weights is None else weights.detach().flatten().double()[order].clamp(min=torch.finfo().tiny)
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= count:
        return torch.cat((distinct, distinct[-1:].expand(count - len(distinct)))).float()
    data = _Data(ordered, weight)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    even = ordered[0] + (ordered[-1] - ordered[0]) * places
    often = ordered[torch.searchsorted(data.weight[1:], data.weight[-1] * places).clamp(max=len(ordered) - 1)]
    (_, levels), (_, other) = found = [data.improved(start) for start in (even, often)]
    return (levels if found[0][0] <= found[1][0] else other).float()


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """The code uint8, of x's shape, of the level nearest to each number; of two as near the lower one. `levels` [count ≤ 256] ascend."""
    wide = levels.to(torch.float32)
    middles = (wide[1:] + wide[:-1]) / 2
    return torch.bucketize(x.to(torch.float32).contiguous(), middles).to(torch.uint8)


class _Data:
    """Ascending samples, and sums over the first 0 to N of them."""

    def __init__(self, ordered: Tensor, weight: Tensor) -> None:
        self.ordered = ordered
        self.weight, self.sum, self.square = (torch.nn.functional.pad((weight * ordered**power).cumsum(0), (1, 0)) for power in range(3))

    def improved(self, levels: Tensor) -> tuple[float, Tensor]:
        """Lloyd's rounds from these levels: the error at the end, and the levels."""
        error = float("inf")
        for _ in range(_ROUNDS):
            levels, found = self._round(levels)
            if found >= error * (1 - _SETTLED):
                return min(found, error), levels
            error = found
        return error, levels

    def _round(self, levels: Tensor) -> tuple[Tensor, float]:
        """Each level as the mean of the samples that are nearest to it, and their error about these means."""
        borders = torch.searchsorted(self.ordered, (levels[1:] + levels[:-1]) / 2, right=True)
        borders = torch.nn.functional.pad(borders, (1, 1))
        borders[-1] = len(self.ordered)
        weight, total, square = (sums[borders].diff() for sums in (self.weight, self.sum, self.square))
        means = torch.where(weight > 0, total / weight, levels)
        return means, float((square - means * total).sum())
