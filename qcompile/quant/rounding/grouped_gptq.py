"""GPTQ (arXiv:2210.17323) for many small matrices at once, each with a second moment of its own: the groups of a convolution.

A depthwise convolution has as many groups as channels, with as few columns as its window has taps: few enough that the walk over them can
be repeated for several scales, and the one that ends with the least error taken.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import WeightError
from qcompile.quant.format import QuantFormat
from qcompile.quant.levels import snap
from qcompile.quant.reference import Grid, Quantized, nearest_grid, per_column, require_weight, snap_to_grid
from qcompile.quant.rounding.mse_clip import Storage, search_grid
from qcompile.quant.scales import spread

_RATIOS = tuple(1 - step / 32 for step in range(9))
"""Of the scale that just holds a group. They differ by more than they clip: another scale is another draw of rounding errors."""


def grouped_gptq(weight: Tensor, hessians: Tensor, form: QuantFormat, *, damping: float = 0.01, name: str = "weight") -> Quantized:
    """Round a weight [G·R, K] so that (w - q) H (w - q)ᵀ is small in each row, with one H for each R rows; never larger than for nearest.

    Args:
        weight: [G·R, K], any float type; computed in float32.
        hessians: second moments of the inputs [G, K, K], positive semidefinite, up to a factor each.
        form: the format.
        damping: share of the mean of each H's diagonal added to it.
        name: what to call the weight in an error.

    Raises:
        WeightError: if the weight or a second moment holds NaN or infinity, or there is not one second moment for each group of rows.
        FormatError: if the weight is not a matrix.
    """
    require_weight(weight, name)
    rows, columns = weight.shape
    groups = len(hessians)
    if hessians.shape != (groups, columns, columns) or not groups or rows % groups:
        raise WeightError(
            f"{name}: expected second moments [groups, {columns}, {columns}] of groups that divide {rows} rows, got {tuple(hessians.shape)}"
        )
    if not bool(torch.isfinite(hessians).all()):
        raise WeightError(f"{name}: expected finite second moments, got NaN or infinity; the calibration data overflows this layer")
    values, second = weight.to(torch.float32), hessians.to(torch.float32)
    factor = _inverse_factors(second, damping)
    nearest = nearest_grid(values, form, name)
    best, levels = nearest, snap_to_grid(nearest.above(values), nearest)
    least = _errors(values, second, best, levels)
    for grid in _grids(values, nearest, name):
        walked = _walk(values, factor, grid)
        found = _errors(values, second, grid, walked)
        better = (found < least).unsqueeze(1)
        least = torch.minimum(found, least)
        levels = torch.where(better, walked, levels)
        best = _chosen(better, grid, best)
    return best.assemble(levels)


def _grids(values: Tensor, nearest: Grid, name: str) -> list[Grid]:
    """Grids to walk on; all share the second level of scales."""
    searched = search_grid(values, nearest.form, None, name)
    if nearest.form.minimum:
        storage, step = _storage(searched, name), searched.step()
        return [searched, *(replace(searched, scale=storage.stored(step * ratio)) for ratio in _RATIOS)]
    if not nearest.form.symmetric or nearest.form.scale_dtype == torch.float8_e8m0fnu:
        return [nearest, searched]
    storage, step = _storage(nearest, name), nearest.step()
    return [searched, *(Grid(nearest.form, storage.stored(step * ratio), nearest.scale2, None) for ratio in _RATIOS)]


def _storage(grid: Grid, name: str) -> Storage:
    return Storage(grid.form, None if grid.scale2 is None else spread(grid.scale2, grid.scale.shape[1]), name)


def _inverse_factors(hessians: Tensor, damping: float) -> Tensor:
    """Upper triangular U [G, K, K] with (H + damping · mean(diag H) · 1)⁻¹ = Uᵀ U; the identity for a group that is never active."""
    wide = hessians.to(torch.float64)
    mean = wide.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean > 0, mean * damping, 1.0)
    wide = wide + added.view(-1, 1, 1) * torch.eye(wide.shape[1], dtype=torch.float64)
    factors: Tensor = torch.linalg.cholesky(torch.linalg.inv(wide), upper=True)
    return factors.to(torch.float32)


def _walk(values: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """The levels [N, K] when each column makes up for the errors of those before it."""
    rows, columns = values.shape
    groups, size = len(factor), grid.form.granularity.size(columns)
    step = per_column(grid.step(), size, columns).view(groups, -1, columns)
    zero = None if grid.zero is None else per_column(grid.zero, size, columns).view(groups, -1, columns)
    work = grid.above(values).view(groups, -1, columns).clone()
    levels = torch.empty_like(work)
    for column in range(columns):
        scale = step[..., column]
        levels[..., column] = snap(work[..., column] / scale, grid.form.element, None if zero is None else zero[..., column])
        error = (work[..., column] - levels[..., column] * scale) / factor[:, column, column].unsqueeze(1)
        work[..., column + 1 :] -= error.unsqueeze(-1) * factor[:, column, column + 1 :].unsqueeze(1)
    return levels.view(rows, columns)


def _errors(values: Tensor, hessians: Tensor, grid: Grid, levels: Tensor) -> Tensor:
    """(w - q) H (w - q)ᵀ of each row [N]."""
    rows, columns = values.shape
    step = per_column(grid.step(), grid.form.granularity.size(columns), columns)
    error = (grid.above(values) - levels * step).view(len(hessians), -1, columns)
    return ((error @ hessians) * error).sum(-1).view(rows)


def _chosen(better: Tensor, one: Grid, other: Grid) -> Grid:
    """Of each row the scales and zeros of one grid or the other."""
    zero = None if one.zero is None or other.zero is None else torch.where(better, one.zero, other.zero)
    # Float8 has no `where` of its own.
    scale = torch.where(better, one.scale.float(), other.scale.float()).to(one.scale.dtype)
    least = None if one.least is None or other.least is None else torch.where(better, one.least, other.least)
    return Grid(one.form, scale, one.scale2, zero, least)
