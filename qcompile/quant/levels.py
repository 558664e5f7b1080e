"""From a weight divided by its scale to the nearest level of an element type, to its code, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from qcompile.quant.element import ElementType


def snap(x: Tensor, element: ElementType, zero: Tensor | None = None) -> Tensor:
    """The level nearest to each of `x` (finite), itself a float of x's dtype; what lies outside goes to the end of the range.

    `zero` (integers, broadcastable to x) shifts the range of an integer element: -zero … levels - 1 - zero.
    """
    if element.is_integer:
        if zero is None:
            return x.round().clamp_(element.low, element.high)
        return torch.minimum(torch.maximum(x.round(), -zero), element.levels - 1 - zero)
    if element.values is None:
        return x.clamp(-element.largest, element.largest).to(torch.float8_e4m3fn).to(x.dtype)
    table = _table(element, x.dtype, x.device)
    place = table.places(x)
    above = x > table.middle.index_select(0, place).view(x.shape)
    return torch.where(above, table.high.index_select(0, place).view(x.shape), table.low.index_select(0, place).view(x.shape))


def encode(values: Tensor, element: ElementType, zero: Tensor | None = None) -> Tensor:
    """Codes uint8 of levels that `snap` returned."""
    if element.is_integer:
        return (values + (float(-element.low) if zero is None else zero)).to(torch.uint8)
    if element.values is None:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    table = _table(element, values.dtype, values.device)
    return table.codes[torch.bucketize(values.contiguous(), table.levels)]


def decode(codes: Tensor, element: ElementType, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The levels that `codes` stand for, as `dtype`; `zero` is broadcastable to them."""
    if element.is_integer:
        return codes.to(dtype) - (float(-element.low) if zero is None else zero)
    if element.values is None:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    return torch.tensor(element.values, dtype=dtype, device=codes.device)[codes.int()]


@dataclass(frozen=True, eq=False)
class _Table:
    """A table of numbers, cut into cells of equal width so narrow that each holds at most one midpoint between two levels.

    Attributes:
        levels: the different levels, ascending.
        codes: the code of each level (of two zeros the positive one).
        first: where the cells begin.
        width: of a cell.
        middle: the midpoint in each cell, or infinity.
        low: the level nearest to what lies below the midpoint, per cell.
        high: the level nearest to what lies above it.
    """

    levels: Tensor
    codes: Tensor
    first: float
    width: float
    middle: Tensor
    low: Tensor
    high: Tensor

    def places(self, x: Tensor) -> Tensor:
        """The cell of each of `x`, as a list. A search in the ascending levels takes seven times as long."""
        return ((x - self.first) / self.width).clamp_(0, len(self.middle) - 1).to(torch.int64).flatten()


@cache
def _table(element: ElementType, dtype: torch.dtype, device: torch.device) -> _Table:
    assert element.values is not None
    codes = {value + 0.0: code for code, value in reversed(list(enumerate(element.values)))}
    levels = sorted(codes)
    middles = [(left + right) / 2 for left, right in pairwise(levels)]
    width = 0.99 * min(right - left for left, right in pairwise(middles))
    first = middles[0] - width / 2
    cells: list[tuple[float, float, float]] = []
    below = 0
    while below < len(middles):
        inside = middles[below] < first + (len(cells) + 1) * width
        cells.append((middles[below] if inside else torch.inf, levels[below], levels[below + inside]))
        below += inside
    cells.append((torch.inf, levels[-1], levels[-1]))
    with torch.inference_mode(False):  # the table outlives the call, and a later one may want gradients
        middle, low, high = (torch.tensor(column, dtype=dtype, device=device) for column in zip(*cells, strict=True))
        ascending = torch.tensor(levels, dtype=dtype, device=device)
        stored = torch.tensor([codes[level] for level in levels], dtype=torch.uint8, device=device)
        return _Table(ascending, stored, first, width, middle, low, high)
