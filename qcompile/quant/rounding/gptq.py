"""GPTQ (arXiv:2210.17323): round a column, let the columns that are still to come make up for its error, go on.

The error of a row is (w - q) H (w - q)ᵀ, where H [K, K] is the second moment of the layer's inputs. Scales are found by a search weighted
by what an error in each column costs once the later ones have made up for it, on the weights as they are when the turn comes to the group,
and fitted once more to the codes at the end.

Shapes: weight [N, K]; U [K, K] upper triangular with H⁻¹ = Uᵀ U; working copies are [K, N], so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.errors import WeightError
from qcompile.quant.format import QuantFormat
from qcompile.quant.levels import snap
from qcompile.quant.precision import medium_precision
from qcompile.quant.reference import Grid, Quantized, nearest_grid, per_column, require_weight, snap_to_grid
from qcompile.quant.rounding.mse_clip import Storage, search, search_grid
from qcompile.quant.scales import spread

_BLOCK = 128
"""Columns whose errors reach the rest of the matrix in one product."""
_RETRIES = 6
_FITS = 2


def gptq(weight: Tensor, hessian: Tensor, form: QuantFormat, *, damping: float = 0.01, name: str = "weight") -> Quantized:
    """Round a weight [N, K] so that (w - q) H (w - q)ᵀ is small in each row; never larger than for rounding to nearest.

    Groups go in the order of their share of the trace of H, and so do the columns within a group: the group's scale is then fitted to the
    weights that it will round. Rows are independent of each other, so weights that read the same input can be stacked.

    Args:
        weight: [N, K], any float type; computed in float32.
        hessian: second moment of the inputs [K, K], up to a factor; zero for columns that were never active.
        form: the format.
        damping: share of the mean of H's diagonal added to it; ten times more where the factorisation fails.
        name: what to call the weight in an error.

    Raises:
        WeightError: if weight or H hold NaN or infinity, H has another shape or is not positive semidefinite.
        FormatError: if the weight is not a matrix.
    """
    require_weight(weight, name)
    values = weight.to(torch.float32)
    second = require_hessian(hessian, values.shape[1], name)
    order = column_order(second.diagonal(), form.granularity.size(values.shape[1]))
    factor = inverse_factor(second[order][:, order], damping, name)
    nearest = nearest_grid(values, form, name)
    start = search_grid(values, form, second.diagonal(), name) if form.minimum else nearest
    plain = nearest, snap_to_grid(nearest.above(values), nearest)
    above = start.above(values)
    with medium_precision():  # what makes up for an error needs few digits: it is rounded to a level itself
        grid, levels, residual = _Walk(above, order, factor, start, name).run()
        grid, pull = fit_scales(values, second, grid, levels, name)
        active = second.diagonal() > 0
        if not bool(active.all()):  # nothing made up for the error of the others, and no fit asked for them
            levels = torch.where(active, levels, snap_to_grid(above, grid))
        return _better_rows(values, second, (grid, levels, pull), plain, residual)


def require_hessian(hessian: Tensor, columns: int, name: str) -> Tensor:
    """H as float32.

    Raises:
        WeightError: if it has another shape than [K, K], or holds NaN or infinity.
    """
    if tuple(hessian.shape) != (columns, columns):
        raise WeightError(f"{name}: expected a second moment of shape ({columns}, {columns}), got {tuple(hessian.shape)}; calibrate again")
    if not bool(torch.isfinite(hessian).all()):
        raise WeightError(f"{name}: expected a finite second moment, got NaN or infinity; the calibration data overflows this layer")
    return hessian.to(torch.float32)


def column_order(diagonal: Tensor, size: int) -> Tensor:
    """Columns by falling diagonal of H within their group, groups by falling sum."""
    groups = torch.split(diagonal, size)
    within = [_falling(group) + index * size for index, group in enumerate(groups)]
    return torch.cat([within[index] for index in _falling(torch.stack([group.sum() for group in groups])).tolist()])


def _falling(values: Tensor) -> Tensor:
    return values.argsort(descending=True, stable=True)


def inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """U upper triangular, float32, with (H + damping · mean(diag H) · 1)⁻¹ = Uᵀ U; computed in float64.

    Raises:
        WeightError: if no damping up to a hundred times the mean makes H positive definite.
    """
    # With H turned over, L Lᵀ = J H J gives U = J L⁻¹ J: one factorisation, and no inverse of H itself.
    turned = hessian.flip(0, 1).to(torch.float64)
    mean = turned.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny) * damping
    for retry in range(_RETRIES):
        turned.diagonal().add_(mean * (10**retry - (10 ** (retry - 1) if retry else 0)))
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            return _inverse_of_lower(lower).to(torch.float32).flip(0, 1)
    raise WeightError(f"{name}: expected a positive semidefinite second moment, got one that damping does not mend; calibrate again")


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """L⁻¹ by halves, `[[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹ C A⁻¹, B⁻¹]]`: products instead of substitutions, none of them with zeros."""
    size = len(lower)
    if size <= _BLOCK:
        one = torch.eye(size, dtype=lower.dtype)
        solved: Tensor = torch.linalg.solve_triangular(lower, one, upper=False)
        return solved
    half = size // 2
    first, second = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    result = lower.new_zeros(size, size)
    result[:half, :half], result[half:, half:] = first, second
    result[half:, :half] = -(second @ (lower[half:, :half] @ first))
    return result


@dataclass
class _Walk:
    """One pass over the columns of a weight, `values` as `Grid.above` gives them."""

    values: Tensor
    order: Tensor
    factor: Tensor
    widest: Grid
    name: str

    def run(self) -> tuple[Grid, Tensor, Tensor]:
        """The grid found, the levels [N, K] and `Quantized.residual`, in the order of the columns of the weight."""
        columns = len(self.order)
        size = self.widest.form.granularity.size(columns)
        work = self.values.t()[self.order].contiguous()
        levels, residual = torch.empty_like(work), torch.empty_like(work, dtype=torch.int8)
        scale, zero = self.widest.scale.clone(), None if self.widest.zero is None else self.widest.zero.clone()
        importance = self.factor.diagonal() ** -2
        start = 0
        while start < columns:
            group = int(self.order[start]) // size
            end = start + min(size, columns - group * size)
            storage = self._storage(group)
            found, offset = search(work[start:end].t().unsqueeze(1), importance[start:end].unsqueeze(0), storage)
            scale[:, group] = storage.stored(found)[:, 0]
            if zero is not None and offset is not None:
                zero[:, group] = offset[:, 0]
            self._round(work, levels, (start, end), found[:, 0], None if offset is None else offset[:, 0])
            residual[start:end] = residual_of(work[start:end] / found[:, 0], levels[start:end])
            start = end
        back = self.order.argsort()
        return replace(self.widest, scale=scale, zero=zero), levels[back].t().contiguous(), residual[back].t().contiguous()

    def _storage(self, group: int) -> Storage:
        second = self.widest.scale2
        if second is not None and second.numel() > 1:
            second = spread(second, self.widest.scale.shape[1])
            second = second if second.shape[1] == 1 else second[:, group : group + 1]
        return Storage(self.widest.form, second, self.name)

    def _round(self, work: Tensor, levels: Tensor, columns: tuple[int, int], step: Tensor, zero: Tensor | None) -> None:
        """Round the columns of one group, in blocks; what a block leaves is spread over all columns after it."""
        element = self.widest.form.element
        for first in range(*columns, _BLOCK):
            last = min(first + _BLOCK, columns[1])
            errors = torch.empty_like(work[first:last])
            for column in range(first, last):
                level = snap(work[column] / step, element, zero)
                error = (work[column] - level * step) / self.factor[column, column]
                levels[column], errors[column - first] = level, error
                work[column + 1 : last].addr_(self.factor[column, column + 1 : last], error, alpha=-1)
            work[last:].addmm_(self.factor[first:last, last:].t(), errors, alpha=-1)


def fit_scales(values: Tensor, hessian: Tensor, grid: Grid, levels: Tensor, name: str) -> tuple[Grid, Tensor]:
    """The scales of least error for the levels chosen, group after group; each step can only lower a row's error. Also (w - q) H [N, K]."""
    size = grid.form.granularity.size(values.shape[1])
    groups = grid.scale.shape[1]
    values, step = grid.above(values), grid.step()
    second = None if grid.scale2 is None else spread(grid.scale2, groups)
    storage = Storage(grid.form, second, name)
    pull = (values - levels * per_column(step, size, values.shape[1])) @ hessian
    if grid.form.scale_dtype == torch.float8_e8m0fnu:
        return grid, pull  # a power of two has no neighbour that is near enough
    for _ in range(_FITS):
        for group in range(groups):
            columns = slice(group * size, (group + 1) * size)
            mine = levels[:, columns]
            stiffness = ((mine @ hessian[columns, columns]) * mine).sum(1)
            change = torch.where(stiffness > 0, (pull[:, columns] * mine).sum(1) / stiffness, 0.0)
            wanted = step.clone()
            wanted[:, group] += change
            usable = storage.usable(torch.where(wanted != 0, wanted, step))[:, group]
            pull.addmm_(mine * (usable - step[:, group]).unsqueeze(1), hessian[columns], alpha=-1)
            step[:, group] = usable
    return replace(grid, scale=storage.stored(step)), pull


def row_errors(values: Tensor, hessian: Tensor, rounded: Tensor) -> Tensor:
    """(w - q) H (w - q)ᵀ of each row [N]."""
    error = values - rounded
    return ((error @ hessian) * error).sum(1)


def residual_of(values: Tensor, levels: Tensor) -> Tensor:
    """How far values, in steps, lie from their levels: `Quantized.residual`, at most just short of the next cell."""
    return ((values - levels) * 256).round_().clamp_(-126, 126).to(torch.int8)


def _better_rows(
    values: Tensor, hessian: Tensor, found: tuple[Grid, Tensor, Tensor], plain: tuple[Grid, Tensor], residual: Tensor
) -> Quantized:
    """Of each row the better of two roundings that share the second level of scales.

    The first comes with its (w - q) H [N, K]; `residual` belongs to it too.
    """
    size, columns = found[0].form.granularity.size(values.shape[1]), values.shape[1]
    (grid, levels, pull), (other, others) = found, plain
    error = ((grid.above(values) - levels * per_column(grid.step(), size, columns)) * pull).sum(1)
    plain_values = other.above(values)
    worse = (error > row_errors(plain_values, hessian, others * per_column(other.step(), size, columns))).unsqueeze(1)
    scale = torch.where(worse, other.step(), grid.step())
    storage = Storage(grid.form, None if grid.scale2 is None else spread(grid.scale2, scale.shape[1]), "weight")
    zero = None if grid.zero is None or other.zero is None else torch.where(worse, other.zero, grid.zero)
    least = None if grid.least is None or other.least is None else torch.where(worse, other.least, grid.least)
    chosen = Grid(grid.form, storage.stored(scale), grid.scale2, zero, least).assemble(torch.where(worse, others, levels))
    beside = residual_of(plain_values / per_column(other.step(), size, columns), others) if bool(worse.any()) else residual
    return replace(chosen, residual=torch.where(worse, beside, residual)) if grid.form.element.is_integer else chosen
