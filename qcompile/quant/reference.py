"""Quantize and dequantize in plain torch: the definition every kernel is judged against.

Shapes: a weight is [N, K] (output rows, input columns), in groups of g columns: G = ceil(K / g).
Codes are unsigned, `value - low` for integers, packed along K (`qcompile.quant.packing`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import FormatError, WeightError
from qcompile.quant.element import element_of
from qcompile.quant.format import QuantFormat
from qcompile.quant.levels import decode, encode, snap
from qcompile.quant.packing import pack as pack
from qcompile.quant.packing import packed_bytes
from qcompile.quant.packing import unpack as unpack
from qcompile.quant.scales import effective, scale_bits, second_level, store, store_minimum


@dataclass(frozen=True)
class Quantized:
    """A packed weight.

    Attributes:
        codes: uint8 [N, ceil(K·b/8)].
        scale: [N, G], in the format's scale dtype.
        zero: uint8 [N, ceil(G·b/8)]; minima [N, G] in the format's scale dtype; or None if symmetric.
        scale2: the second level of scales (`qcompile.quant.scales`), or None.
        residual: int8 [N, K], how far each value lay from its level when it was rounded, in steps / 256; None where nobody keeps it. No
            part of the format: learning starts there.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scale2: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """The levels that each group of a weight can take: stored scales [N, G], their second level, zero points (float [N, G]) or None.

    With `least`, the stored values of code 0 [N, G], levels count from there and zero points are 0: what is rounded is `above(values)`.
    """

    form: QuantFormat
    scale: Tensor
    scale2: Tensor | None
    zero: Tensor | None
    least: Tensor | None = None

    def step(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales [N, G] that values are divided by."""
        return effective(self.scale, self.scale2, dtype)

    def above(self, values: Tensor) -> Tensor:
        """What of `values` [N, K] the levels stand for: themselves, or their distance from the minimum of their group."""
        if self.least is None:
            return values
        columns = values.shape[1]
        return values - per_column(self.least.to(values.dtype), self.form.granularity.size(columns), columns)

    def assemble(self, values: Tensor) -> Quantized:
        """Pack the levels [N, K] that `snap` returned."""
        element, columns = self.form.element, values.shape[1]
        zero = None if self.zero is None else per_column(self.zero, self.form.granularity.size(columns), columns)
        codes = pack(encode(values, element, zero), element.bits)
        offset = self.least
        if offset is None and self.zero is not None:
            offset = pack(self.zero.to(torch.uint8), element.bits)
        return Quantized(codes, self.scale, offset, self.scale2)


def grouped(weight: Tensor, size: int, *, repeat: bool = False) -> Tensor:
    """View [N, K] as [N, G, g], the last group padded with 0, or repetitions of its last column, where g does not divide K."""
    rows, columns = weight.shape
    if repeat and columns % size:
        return torch.cat((weight, weight[:, -1:].expand(rows, -columns % size)), dim=1).view(rows, -1, size)
    return torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)


def per_column(values: Tensor, size: int, columns: int) -> Tensor:
    """Spread one value per group [N, G] over the columns: [N, K]."""
    return values.repeat_interleave(size, dim=1)[:, :columns]


def extreme_scale(groups: Tensor, form: QuantFormat) -> Tensor:
    """Scale [N, G] that maps the extreme of larger magnitude to the end of the range: for integers the lowest code, -2^(b-1).

    The extreme's sign is then kept in the scale, so the side with one level more always serves the longer tail. A power of two has
    no sign: integers keep the positive reading, with 2^(b-1) - 1 at the end. A group of zeros gets scale 1 and stays exact zeros.
    """
    magnitude, index = groups.abs().max(dim=-1, keepdim=True)
    if not form.element.is_integer:
        scale = magnitude.squeeze(-1) / form.element.largest
    elif form.scale_dtype == torch.float8_e8m0fnu:
        scale = torch.maximum(groups.amax(-1) / form.element.high, groups.amin(-1) / form.element.low)
    else:
        scale = groups.gather(-1, index).squeeze(-1) / form.element.low
    return torch.where(magnitude.squeeze(-1) > 0, scale, torch.ones_like(scale))


def asymmetric_range(groups: Tensor, form: QuantFormat) -> tuple[Tensor, Tensor]:
    """Scale [N, G] and the least value [N, G] of each group, the range widened to contain 0.

    For a format with minima groups are what `Grid.above` leaves of them, and the range begins at 0.
    """
    groups = groups.clamp(min=0) if form.minimum else groups
    least = groups.amin(-1).clamp(max=0)
    scale = (groups.amax(-1).clamp(min=0) - least) / (form.element.levels - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), least


def stored_grid(scale: Tensor, least: Tensor | None, form: QuantFormat, name: str) -> Grid:
    """The grid of real scales [N, G] as the format stores them; `least` [N, G] is where an asymmetric range begins."""
    scale2 = second_level(scale, form)
    stored = store(scale, scale2, form, name)
    if least is None:
        return Grid(form, stored, scale2, None)
    zero = (-least / effective(stored, scale2, scale.dtype)).round().clamp(0, form.element.levels - 1)
    return Grid(form, stored, scale2, zero)


def require_weight(weight: Tensor, name: str) -> None:
    """Refuse what cannot be rounded.

    Raises:
        WeightError: if the weight holds NaN or infinity, naming the first place.
        FormatError: if the weight is not a matrix.
    """
    if weight.dim() != 2:
        raise FormatError(f"{name}: expected a matrix [N, K], got shape {tuple(weight.shape)}; leave it out with ignore=")
    if not bool(torch.isfinite(weight).all()):
        row, column = (int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
        raise WeightError(
            f"{name}[{row}, {column}] is {weight[row, column].item()}: expected finite weights; repair the checkpoint or "
            "add the weight to ignore="
        )


def nearest_grid(values: Tensor, form: QuantFormat, name: str) -> Grid:
    """The grid whose range just holds every group of `values` [N, K]."""
    groups = grouped(values, form.granularity.size(values.shape[1]), repeat=form.minimum)
    if form.minimum:
        return minimum_grid(groups, form, name)
    if form.symmetric:
        return _kept(groups, stored_grid(extreme_scale(groups, form), None, form, name), name)
    return stored_grid(*asymmetric_range(groups, form), form, name)


def minimum_grid(groups: Tensor, form: QuantFormat, name: str) -> Grid:
    """The grid from the least to the greatest value of each group [N, G, g]; the minimum is rounded first, and the scale reaches from it.

    What GGUF's Q4_1 or Q5_1 stand for, where a block uses both its ends, comes back with the same scale, minimum and codes.
    """
    least = store_minimum(groups.amin(-1), form, name)
    scale = (groups.amax(-1) - least.to(groups.dtype)) / (form.element.levels - 1)
    stored = store(torch.where(scale > 0, scale, torch.ones_like(scale)), None, form, name)
    return Grid(form, stored, None, torch.zeros_like(scale), least)


def _kept(groups: Tensor, grid: Grid, name: str) -> Grid:
    """The grid, but for groups [N, G, g] that lie on one whose greatest code is 2^(b-1) - 1, of either sign: they keep theirs.

    GGUF's Q8_0 and symmetric checkpoints of others are made so, and are given back as they were. That the first group of no row
    lies on such a grid is taken for an answer: of weights that were never rounded none does.
    """
    form = grid.form
    if not form.element.is_integer or form.scale_dtype.itemsize == 1:
        return grid

    def exact(some: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = some.abs().amax(-1)
        stored = store(torch.where(magnitude > 0, magnitude / form.element.high, 1.0), None, form, name)
        step = stored.to(some.dtype).unsqueeze(-1)
        same = (snap(some / step, form.element).mul_(step) == some).all(-1)
        return stored, same & (magnitude > 0)

    if not bool(exact(groups[:, :1])[1].any()):
        return grid
    scale, same = exact(groups)
    return Grid(form, torch.where(same, scale, grid.scale), None, None)


def snap_to_grid(values: Tensor, grid: Grid) -> Tensor:
    """The nearest level of its group, in steps, for each of `values` [N, K], which are those of `Grid.above`."""
    columns = values.shape[1]
    groups = grouped(values, grid.form.granularity.size(columns)) / grid.step(values.dtype).unsqueeze(-1)
    zero = None if grid.zero is None else grid.zero.unsqueeze(-1)
    return snap(groups, grid.form.element, zero).flatten(1)[:, :columns]


def round_to_grid(values: Tensor, grid: Grid) -> Quantized:
    """Each of `values` [N, K] to the nearest level of its group."""
    return grid.assemble(snap_to_grid(grid.above(values), grid))


def quantize(weight: Tensor, form: QuantFormat, name: str = "weight") -> Quantized:
    """Round a float weight [N, K] to the nearest level of `form`; at most half a step away inside the range.

    Args:
        weight: [N, K], any float type; computed in float32.
        form: the format.
        name: what to call the weight in an error.

    Raises:
        WeightError: if the weight holds NaN or infinity, naming the first place.
        FormatError: if the weight is not a matrix.
    """
    require_weight(weight, name)
    values = weight.to(torch.float32)
    return round_to_grid(values, nearest_grid(values, form, name))


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype,
    element: str = "int", scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Invert `quantize`: `(code - zero) · scale` as `dtype` [N, K]; without `zero` the zero point is 2^(b-1).

    A floating `zero` is the minimum of each group: `code · scale + zero`, product and sum rounded each (the product of a 16-bit scale
    and a code of 8 bits is exact).

    Args:
        codes: uint8 [N, ceil(K·b/8)].
        scale: [N, G].
        zero: uint8 [N, ceil(G·b/8)], [N, G] in the scale's dtype, or None.
        bits: b.
        group_size: g, or -1 for one group per row.
        columns: K.
        dtype: the result's type; the product is computed in float32 and rounded once (float64 stays exact in float64).
        element: what a code stands for: `int`, `nf4`, `fp4`, `fp8`.
        scale2: the second level of scales, or None.

    Raises:
        FormatError: for minima of another shape or dtype than the scales.
    """
    size = columns if group_size == -1 else min(group_size, columns)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    factor = per_column(effective(scale, scale2, work), size, columns)
    if zero is not None and has_minima(scale, zero):
        return (unpack(codes, bits, columns).to(work) * factor + per_column(zero.to(work), size, columns)).to(dtype)
    offset = None if zero is None else per_column(unpack(zero, bits, scale.shape[1]).to(work), size, columns)
    values = decode(unpack(codes, bits, columns), element_of(element, bits), offset, work)
    return (values * factor).to(dtype)


def has_minima(scale: Tensor, zero: Tensor) -> bool:
    """Whether `zero` holds the value of code 0 of each group rather than its zero point.

    Raises:
        FormatError: if it does, in another shape or dtype than the scales.
    """
    if not zero.is_floating_point():
        return False
    if zero.shape != scale.shape or zero.dtype != scale.dtype:
        found, wanted = (f"{part.dtype} {list(part.shape)}" for part in (zero, scale))
        raise FormatError(f"minima are {found}: expected {wanted} as the scales are; requantize the weight")
    return True


def restore(quantized: Quantized, form: QuantFormat, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that a packed one stands for."""
    q, element = quantized, form.element
    size = form.granularity.group_size
    return dequantize(q.codes, q.scale, q.zero, element.bits, size, columns, dtype, element.kind, q.scale2)


def stored_bits(form: QuantFormat, rows: int, columns: int) -> int:
    """Bits stored for one [N, K] weight: codes, scales of both levels, zero points or minima."""
    bits = form.element.bits
    groups = form.granularity.groups(columns)
    zeros = 0 if form.symmetric else groups * form.scale_dtype.itemsize * 8 if form.minimum else packed_bytes(groups, bits) * 8
    return rows * (packed_bytes(columns, bits) * 8 + zeros) + scale_bits(form, rows, groups)


def part_shape(form: QuantFormat, part: str, rows: int, columns: int) -> tuple[int, int]:
    """The shape of the tensor called `part` of a [N, K] weight."""
    groups, bits = form.granularity.groups(columns), form.element.bits
    if part == "scale2":
        return (rows, form.second_scales(groups)) if form.scale_dtype == torch.int8 else (1, 1)
    zeros = groups if form.minimum else packed_bytes(groups, bits)
    return {"codes": (rows, packed_bytes(columns, bits)), "scale": (rows, groups), "zero": (rows, zeros)}[part]


def part_dtype(form: QuantFormat, part: str) -> torch.dtype:
    """The dtype of the tensor called `part`."""
    second = torch.float16 if form.scale_dtype == torch.int8 else torch.float32
    zero = form.scale_dtype if form.minimum else torch.uint8
    return {"scale": form.scale_dtype, "scale2": second, "zero": zero}.get(part, torch.uint8)
