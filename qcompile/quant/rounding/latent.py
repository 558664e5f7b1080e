"""Rounded weights that can still be learned: each keeps a continuous value whose nearest level it is, each group a factor on its scale.

A gradient passes the rounding as if it were not there (straight-through, arXiv:1308.3432), so that a level changes once the evidence
has moved its value across the border of its cell. Nothing is stored for it: what comes out is codes and scales of the same format.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.quant.format import QuantFormat
from qcompile.quant.levels import decode, snap
from qcompile.quant.reference import Grid, Quantized, grouped, unpack
from qcompile.quant.rounding.mse_clip import Storage
from qcompile.quant.scales import effective

_INSIDE = 0.49
"""How far from its level a continuous value starts, and how far outside the range it may go, in steps: just short of the next cell."""


def _grid(rounded: Quantized, form: QuantFormat) -> Grid:
    if rounded.zero is None:
        return Grid(form, rounded.scale, rounded.scale2, None)
    if form.minimum:
        return Grid(form, rounded.scale, None, torch.zeros_like(rounded.scale, dtype=torch.float32), rounded.zero)
    zero = unpack(rounded.zero, form.element.bits, rounded.scale.shape[1]).to(torch.float32)
    return Grid(form, rounded.scale, rounded.scale2, zero)


class LatentWeight:
    """One weight [N, K] while its rounding is learned.

    Attributes:
        latent: [N, K], the continuous values, in steps of their group; `snap` gives the levels.
        stretch: [N, G], the logarithm of the factor on each scale.
        adapts_scale: whether scales may move: those under a second level and powers of two may not.
    """

    def __init__(self, weight: Tensor, rounded: Quantized, form: QuantFormat) -> None:
        """Start at a rounding of `weight` [N, K]: values lie where they lay in their cells, else the weight's own are moved into them."""
        self._form, self._columns = form, weight.shape[1]
        self._size = form.granularity.size(self._columns)
        bits = form.element.bits
        self._start = _grid(rounded, form)
        self._step = effective(rounded.scale, rounded.scale2, torch.float32)
        self.adapts_scale = rounded.scale2 is None and form.scale_dtype != torch.float8_e8m0fnu
        levels = decode(unpack(rounded.codes, bits, self._columns), form.element, self._zero(), torch.float32)
        if rounded.residual is None:
            self.latent = self._into_cells(self._start.above(weight.to(torch.float32)) / self._spread(self._step), levels)
        else:
            self.latent = levels + rounded.residual.to(torch.float32) / 256
        self.stretch = torch.zeros_like(self._step)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] as it is rounded now."""
        distance = self._levels().mul_(self._spread(self._current()))
        least = self._start.least
        return (distance if least is None else distance.add_(self._spread(least.to(torch.float32)))).to(dtype)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the weight [N, K] those of `latent` and `stretch`."""
        along = gradient.to(torch.float32) * self._spread(self._current())
        return along, self._sums(self._levels().mul_(along))

    def confine(self) -> None:
        """Bring values that have left the range back to its edge, where they can still turn around."""
        element, zero = self._form.element, self._zero()
        if not element.is_integer:
            self.latent.clamp_(-element.largest, element.largest)
        elif zero is None:
            self.latent.clamp_(element.low - _INSIDE, element.high + _INSIDE)
        else:
            torch.minimum(torch.maximum(self.latent, -zero - _INSIDE), element.levels - 1 + _INSIDE - zero, out=self.latent)

    @property
    def spacing(self) -> float:
        """Mean distance between neighbouring levels, in steps."""
        element = self._form.element
        return 1.0 if element.is_integer else 2 * element.largest / (element.levels - 1)

    def rounded(self, name: str = "weight") -> Quantized:
        """The packed weight as it is rounded now."""
        start = self._start
        scale = Storage(self._form, None, name).stored(self._current()) if self.adapts_scale else start.scale
        return replace(start, scale=scale).assemble(self._levels())

    def _levels(self) -> Tensor:
        return snap(self.latent, self._form.element, self._zero())

    def _zero(self) -> Tensor | None:
        return None if self._start.zero is None else self._spread(self._start.zero)

    def _current(self) -> Tensor:
        return self._step * self.stretch.exp()

    def _into_cells(self, values: Tensor, levels: Tensor) -> Tensor:
        if self._form.element.is_integer:
            return torch.minimum(torch.maximum(values, levels - _INSIDE), levels + _INSIDE)
        return torch.where(snap(values, self._form.element) == levels, values, levels)

    def _spread(self, values: Tensor) -> Tensor:
        rows, groups = values.shape
        return values.unsqueeze(-1).expand(rows, groups, self._size).reshape(rows, -1)[:, : self._columns]

    def _sums(self, values: Tensor) -> Tensor:
        return grouped(values, self._size).sum(-1)
