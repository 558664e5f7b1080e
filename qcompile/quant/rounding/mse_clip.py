"""Scales and zero points by search: per group the one with the least, possibly weighted, squared error.

Shapes: groups [N, G, g]; importance [G, g], one weight per input column (the diagonal of the inputs' second moment, say); scales [N, G].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.quant.format import QuantFormat
from qcompile.quant.levels import snap
from qcompile.quant.reference import Grid, Quantized, asymmetric_range, extreme_scale, grouped, nearest_grid, require_weight, round_to_grid
from qcompile.quant.rounding.minima import REFINEMENTS, TILE, fitted_minima, ratios
from qcompile.quant.scales import effective, spread, store


@dataclass(frozen=True)
class Storage:
    """How a searched scale will be stored, so that only scales that can be stored are compared: second level [N, G], [1, 1] or None."""

    form: QuantFormat
    scale2: Tensor | None
    name: str

    def usable(self, scale: Tensor) -> Tensor:
        """The scale [N, G] that will stand for `scale` once stored."""
        return effective(self.stored(scale), self.scale2, scale.dtype)

    def stored(self, scale: Tensor) -> Tensor:
        """The scale [N, G] in the format's own dtype."""
        return store(scale, self.scale2, self.form, self.name)

    def rows(self, rows: slice) -> Storage:
        """The same for some of the rows."""
        whole = self.scale2 is None or self.scale2.shape[0] == 1
        return self if whole else Storage(self.form, self.scale2[rows], self.name)  # type: ignore[index]


def mse_clip(weight: Tensor, form: QuantFormat, importance: Tensor | None = None, *, name: str = "weight") -> Quantized:
    """Round a weight [N, K] with scales that minimise the squared error of each group, weighted by `importance` [K] of the inputs.

    Never worse than rounding with the scale that just holds the group. A symmetric range may be turned over, so that the side with one
    level more serves either tail.

    Raises:
        WeightError: if the weight holds NaN or infinity, or a scale does not fit its type.
        FormatError: if the weight is not a matrix.
    """
    require_weight(weight, name)
    values = weight.to(torch.float32)
    return round_to_grid(values, search_grid(values, form, importance, name))


def search_grid(values: Tensor, form: QuantFormat, importance: Tensor | None, name: str) -> Grid:
    """The grid of least weighted squared error for `values` float32 [N, K]; the second level is that of the widest scales."""
    columns = values.shape[1]
    size = form.granularity.size(columns)
    weights = torch.ones(1, columns) if importance is None else importance.to(torch.float32).view(1, columns)
    nearest = nearest_grid(values, form, name)
    if form.minimum:
        return fitted_minima(values, nearest, grouped(weights, size)[0], name)
    groups = grouped(values, size)
    storage = Storage(form, None if nearest.scale2 is None else spread(nearest.scale2, groups.shape[1]), name)
    found = search(groups, grouped(weights, size)[0], storage)
    return Grid(form, storage.stored(found[0]), nearest.scale2, found[1])


def search(groups: Tensor, importance: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """The best usable scale [N, G] and zero point [N, G] (None for a symmetric format) of each group; tile by tile."""
    rows = max(1, TILE // max(1, groups.shape[1] * groups.shape[2]))
    tiles = [slice(start, start + rows) for start in range(0, groups.shape[0], rows)]
    found = [_Tile(groups[tile], importance, storage.rows(tile)).search() for tile in tiles]
    scale = torch.cat([scale for scale, _ in found])
    return scale, None if storage.form.symmetric else torch.cat([zero for _, zero in found if zero is not None])


class _Tile:
    """Some rows of groups, and the best scale and zero point for each group so far.

    With codes c fixed, the squared error Σ h (w - s·c)² is Σ h w² - (2 s Σ h w c - s² Σ h c²): the bracket is the gain that candidates are
    compared by, and s = Σ h w c / Σ h c² maximises it, so each candidate also yields a better one.
    """

    def __init__(self, groups: Tensor, importance: Tensor, storage: Storage) -> None:
        self.groups, self.importance, self.storage = groups, importance, storage
        self.weighted = groups * importance
        self.form = storage.form
        # A power of two has no scale beside it to be refined to.
        self.refines = self.form.scale_dtype != torch.float8_e8m0fnu
        self.gain = torch.full(groups.shape[:2], -torch.inf)
        self.scale = torch.ones(groups.shape[:2])
        self.zero: Tensor | None = None if self.form.symmetric else torch.zeros(groups.shape[:2])

    def search(self) -> tuple[Tensor, Tensor | None]:
        """Try the ranges, refine the best, and keep the widest range where nothing beats it."""
        if self.form.symmetric:
            self._symmetric()
        else:
            self._asymmetric()
        for _ in range(REFINEMENTS if self.refines else 0):
            self._try(self.scale, self.zero)
        return self._no_worse_than_widest()

    def _symmetric(self) -> None:
        widest = extreme_scale(self.groups, self.form)
        signless = self.form.scale_dtype == torch.float8_e8m0fnu or self.form.element.name in ("fp4", "fp8")
        shares = (1.0, 0.5, 0.25) if not self.refines else ratios(self.form.element.bits)
        for ratio in shares:
            for sign in (1.0,) if signless else (1.0, -1.0):
                self._try(widest * (sign * ratio), None)

    def _asymmetric(self) -> None:
        scale, least = asymmetric_range(self.groups, self.form)
        top = self.form.element.levels - 1
        for ratio in ratios(self.form.element.bits):
            if self.form.element.bits == 2 and not self.form.minimum:
                for zero in range(top + 1):
                    self._try(scale * ratio, torch.full_like(scale, zero))
            else:
                self._try(scale * ratio, (-least / scale).round().clamp_(0, top))

    def _try(self, scale: Tensor, zero: Tensor | None) -> None:
        scale = self.storage.usable(scale)
        codes = snap(self.groups / scale.unsqueeze(-1), self.form.element, None if zero is None else zero.unsqueeze(-1))
        linear = (self.weighted * codes).sum(-1)
        square = (codes.square_() * self.importance).sum(-1)
        self._keep(scale, zero, linear, square)
        if self.refines:
            better = torch.where(square > 0, linear / square, scale)
            self._keep(self.storage.usable(torch.where(better != 0, better, scale)), zero, linear, square)

    def _keep(self, scale: Tensor, zero: Tensor | None, linear: Tensor, square: Tensor) -> None:
        gain = scale * (2 * linear - scale * square)
        best = gain > self.gain
        self.gain = torch.where(best, gain, self.gain)
        self.scale = torch.where(best, scale, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(best, zero, self.zero)

    def _no_worse_than_widest(self) -> tuple[Tensor, Tensor | None]:
        """Compare with the widest range by the error itself: the gain is a difference of large numbers where the fit is perfect."""
        if self.form.symmetric:
            widest, zero = self.storage.usable(extreme_scale(self.groups, self.form)), None
        else:
            raw, least = asymmetric_range(self.groups, self.form)
            widest = self.storage.usable(raw)
            zero = (-least / widest).round().clamp(0, self.form.element.levels - 1)
        better = self._error(self.scale, self.zero) < self._error(widest, zero)
        return torch.where(better, self.scale, widest), None if zero is None else torch.where(better, self.zero, zero)  # type: ignore[arg-type]

    def _error(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        wide = scale.unsqueeze(-1)
        codes = snap(self.groups / wide, self.form.element, None if zero is None else zero.unsqueeze(-1))
        return ((self.groups - codes * wide).square_() * self.importance).sum(-1)
