"""Scale and minimum of each group by search: those with the least, possibly weighted, squared error.

Shapes: groups [N, G, g]; importance [G, g], one weight per input column; scales and minima [N, G].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.quant.reference import Grid, grouped
from qcompile.quant.scales import store, store_minimum

TILE = 1 << 17
"""Elements worked on at once: their temporaries stay in the cache of a core."""
REFINEMENTS = 2
_LEAST_RATIO = {2: 0.3, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.85, 8: 0.9}
"""By bits: the shortest range tried, as a share of the group's own. Fewer levels are better spent on the bulk."""
_RATIOS = 8


def ratios(bits: int) -> list[float]:
    """Shares of a group's range to try for a code of `bits` bits."""
    least = _LEAST_RATIO[bits]
    return [least + (1.0 - least) * index / (_RATIOS - 1) for index in range(_RATIOS)]


def fitted_minima(values: Tensor, nearest: Grid, importance: Tensor, name: str) -> Grid:
    """The grid with minima of least weighted squared error for `values` float32 [N, K]; no group is worse off than with `nearest`.

    Ranges of several lengths in the middle of the group's own are tried, and of each the scale and minimum that fit its codes best,
    as llama.cpp does for formats with minima.
    """
    assert nearest.least is not None
    groups = grouped(values, nearest.form.granularity.size(values.shape[1]), repeat=True)
    rows = max(1, TILE // max(1, groups.shape[1] * groups.shape[2]))
    parts = [slice(start, start + rows) for start in range(0, groups.shape[0], rows)]
    found = [_Search(groups[part], importance, nearest, part, name).run() for part in parts]
    scale, least = (torch.cat([pair[index] for pair in found]) for index in (0, 1))
    return Grid(nearest.form, scale, None, nearest.zero, least)


class _Search:
    """Some rows of groups, and the best stored scale and minimum of each group so far."""

    def __init__(self, groups: Tensor, importance: Tensor, nearest: Grid, rows: slice, name: str) -> None:
        assert nearest.least is not None
        self.groups, self.importance, self.form, self.name = groups, importance, nearest.form, name
        self.top = float(nearest.form.element.levels - 1)
        self.scale, self.least = nearest.scale[rows], nearest.least[rows]
        self.error = self._rounded(self.scale, self.least)[1]

    def run(self) -> tuple[Tensor, Tensor]:
        """Try the ranges and refine the best."""
        low, length = self.groups.amin(-1), self.groups.amax(-1) - self.groups.amin(-1)
        for ratio in ratios(self.form.element.bits):
            self._try(length * (ratio / self.top), low + length * ((1 - ratio) / 2))
        for _ in range(REFINEMENTS):
            self._try(self.scale.float(), self.least.float())
        return self.scale, self.least

    def _try(self, scale: Tensor, least: Tensor) -> None:
        """A scale and minimum, and those that fit the codes they give."""
        codes = self._keep(scale, least)
        weight = self.importance.sum(-1)
        centered = self.groups - least.unsqueeze(-1)
        sums, squares = (codes * self.importance).sum(-1), (codes.square() * self.importance).sum(-1)
        first, second = (centered * self.importance).sum(-1), (centered * codes * self.importance).sum(-1)
        spread = weight * squares - sums.square()
        better = torch.where(spread > 0, (weight * second - sums * first) / spread, scale)
        self._keep(better, least + torch.where(weight > 0, (first - better * sums) / weight, 0.0))

    def _keep(self, scale: Tensor, least: Tensor) -> Tensor:
        """Remember where the stored scale and minimum are the best; their codes."""
        stored = store(torch.where(scale > 0, scale, torch.ones_like(scale)), None, self.form, self.name)
        offset = store_minimum(least, self.form, self.name)
        codes, error = self._rounded(stored, offset)
        best = error < self.error
        self.error = torch.where(best, error, self.error)
        self.scale, self.least = torch.where(best, stored, self.scale), torch.where(best, offset, self.least)
        return codes

    def _rounded(self, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        step, offset = scale.float().unsqueeze(-1), least.float().unsqueeze(-1)
        codes = ((self.groups - offset) / step).round_().clamp_(0, self.top)
        error = (self.groups - (codes * step + offset)).square_() * self.importance
        return codes, error.sum(-1)
