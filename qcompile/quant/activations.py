"""Quantized activations in plain torch: the definition every integer kernel is judged against.

Shapes: an activation is [..., K] in groups of g columns, G = ceil(K / g), the last group possibly shorter; -1 is one group (the token).
Integer codes are signed int8 [..., K] whatever their width, float8 codes float8_e4m3fn. The scale [..., G] of groups is stored as
float16, and codes are made by what is stored: 4 bits in groups of 64 take 4.25 bits. The scale of a token has the working dtype
(float32; float64 for float64 input). A tensor of one element serves every token (static quantization).
Sums of products of codes are exact, so a row's result never depends on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.packing import unpack
from qcompile.quant.reference import has_minima
from qcompile.quant.scales import effective

FLOAT8_MAX = 448.0
HALF_LEAST, HALF_MAX = 2.0**-24, 65504.0
"""The smallest and the greatest positive float16."""
_FLOAT32_INTEGERS = 1 << 24


def _working(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def working_dtype(scale: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What sums of scaled codes are computed in on their way to `dtype`: float64 if that or the scale is, else float32."""
    return torch.float64 if torch.float64 in (scale.dtype, dtype) else torch.float32


def scale_dtype(dtype: torch.dtype, group_size: int) -> torch.dtype:
    """What dynamic scales of activations of `dtype` are stored as: float16 for groups."""
    return torch.promote_types(dtype, torch.float32) if group_size == -1 else torch.float16


def _stored(scale: Tensor, group_size: int) -> Tensor:
    """The scale as it is stored: to nearest, 1 for 0, magnitudes beyond the range of float16 moved to its ends."""
    scale = torch.where(scale != 0, scale, torch.ones_like(scale))
    if group_size == -1:
        return scale
    return torch.copysign(scale.abs().clamp(HALF_LEAST, HALF_MAX), scale).to(torch.float16)


def group_columns(columns: int, group_size: int) -> int:
    """Columns in a full group of an axis of `columns` columns."""
    return columns if group_size == -1 else min(group_size, columns)


def _grouped(x: Tensor, size: int) -> Tensor:
    """View [..., K] as [..., G, g], the last group filled up with 0."""
    if size == x.shape[-1]:
        return x.unsqueeze(-2)
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).reshape(*x.shape[:-1], -1, size)


def _spread(values: Tensor, size: int, columns: int) -> Tensor:
    """One value per group [..., G] over the columns [..., K]; a single value is left to broadcast."""
    return values if values.shape[-1] == 1 else values.repeat_interleave(size, dim=-1)[..., :columns]


def dynamic_scale(x: Tensor, bits: int, group_size: int, element: str = "int", clip: float = 1.0) -> Tensor:
    """The scale [..., G] of x [..., K], as `scale_dtype`.

    Integers: `clip · extreme / -2^(b-1)`, where the extreme of larger magnitude (the negative one in a tie) keeps its sign, so that the
    side with one level more serves the longer tail: the scale can be negative. float8: `clip · max|x| / 448`. Zeros give scale 1.
    """
    groups = _grouped(_working(x), group_columns(x.shape[-1], group_size))
    least, greatest = torch.aminmax(groups, dim=-1)
    if element == "fp8":
        scale = torch.maximum(greatest, -least) * (clip / FLOAT8_MAX)
    else:
        scale = torch.where(greatest > -least, greatest, least) * (-clip / (1 << (bits - 1)))
    return _stored(scale, group_size)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, element: str = "int") -> Tensor:
    """Codes [..., K]: `clamp(round(x / scale) + zero)`, half to even; float8_e4m3fn saturating for element fp8."""
    columns = x.shape[-1]
    size = group_columns(columns, group_size)
    scaled = _working(x) / _spread(scale, size, columns)
    if element == "fp8":
        return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float32).to(torch.float8_e4m3fn)
    scaled = scaled.round()
    if zero is not None:
        scaled = scaled + _spread(zero, size, columns)
    return scaled.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).to(torch.int8)


def quantize(x: Tensor, bits: int, group_size: int, element: str = "int", clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Symmetric codes [..., K] and scale [..., G] of x, the range taken from x itself."""
    scale = dynamic_scale(x, bits, group_size, element, clip)
    return encode(x, scale, None, bits, group_size, element), scale


def quantize_asymmetric(x: Tensor, bits: int, group_size: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., K], scale [..., G] and zero int32 [..., G] with `x ≈ (code - zero) · scale`; the range contains 0."""
    groups = _grouped(_working(x), group_columns(x.shape[-1], group_size))
    least, greatest = groups.amin(-1).clamp(max=0) * clip, groups.amax(-1).clamp(min=0) * clip
    scale = _stored((greatest - least) / ((1 << bits) - 1), group_size)
    low = -(1 << (bits - 1))
    zero = ((-least / scale).round() + low).clamp(low, -low - 1).to(torch.int32)
    return encode(x, scale, zero, bits, group_size), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """`(code - zero) · scale` as `dtype` [..., K], computed in `working_dtype` and rounded once."""
    columns = codes.shape[-1]
    size = group_columns(columns, group_size)
    work = working_dtype(scale, dtype)
    values = codes.to(torch.float32).to(work)
    if zero is not None:
        values = values - _spread(zero, size, columns).to(work)
    return (values * _spread(scale, size, columns).to(work)).to(dtype)


def exact_dtype(bound: int, terms: int) -> torch.dtype:
    """The float that adds `terms` integers of magnitude `bound` at most without rounding: float32 below 2^24, else float64."""
    return torch.float32 if bound * terms <= _FLOAT32_INTEGERS else torch.float64


def exact_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """`a · bᵀ` of integer-valued a [M, K] and b [N, K] (any dtype) without rounding, as float32 or float64.

    Args:
        a: [M, K].
        b: [N, K].
        bound: what no `|a[m, k] · b[n, k]|` exceeds; where K times it stays below 2^24, float32 holds every partial sum.
    """
    work = exact_dtype(bound, a.shape[-1])
    return torch.matmul(a.to(work), b.to(work).t())


def signed_weight(codes: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int) -> Tensor:
    """Packed weight codes uint8 [N, ceil(K·b/8)] as `code - zero` [N, K]: int8, or int16 with a zero point.

    Codes of a weight with minima (a floating `zero`) stay as they are.
    """
    unsigned = unpack(codes, bits, columns)
    if zero is None:
        return (unsigned - (1 << (bits - 1))).view(torch.int8)  # wraps around, as two's complement does
    values = unsigned.to(torch.int16)
    if zero.is_floating_point():
        return values
    size = group_columns(columns, group_size)
    groups = -(-columns // size)
    return values - _spread(unpack(zero, bits, groups).to(torch.int16), size, columns)


@dataclass(frozen=True)
class WeightScales:
    """The scales [N, G] of a weight, their second level or None, its group size, and what code 0 stands for [N, G], or None if 0."""

    scale: Tensor
    scale2: Tensor | None
    group_size: int
    minimum: Tensor | None = None

    @staticmethod
    def of(scale: Tensor, scale2: Tensor | None, zero: Tensor | None, group_size: int) -> WeightScales:
        """Those of a weight with these parts.

        Raises:
            FormatError: for minima of another shape or dtype than the scales.
        """
        return WeightScales(scale, scale2, group_size, zero if zero is not None and has_minima(scale, zero) else None)


def integer_matmul(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, factors: WeightScales, group_size: int, bound: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`Σ_g scale_g · w_scale_g · Σ_k (code - zero) · weight` [M, N] in `working_dtype`, over runs of columns that share both scales.

    With minima a run adds `scale_g · (w_scale_g · Σ_k (code - zero) · weight + minimum_g · Σ_k (code - zero))`: the inner sums are exact,
    each product and sum of floats is rounded by itself.

    Args:
        codes: int8 or float8 [..., K]; M is the product of the leading sizes.
        scale: [..., Ga], or one element for all rows.
        zero: int32 alike, or None.
        weight: signed numbers [N, K] as `signed_weight` makes them, or float8.
        factors: the weight's scales.
        group_size: of the activations; of the two sizes one divides the other, or spans the row.
        bound: what no magnitude of `weight` exceeds.
        dtype: what the result will be rounded to.

    Raises:
        FormatError: for group sizes that do not nest.
    """
    rows, columns = codes.reshape(-1, codes.shape[-1]), codes.shape[-1]
    a_size, w_size = group_columns(columns, group_size), group_columns(columns, factors.group_size)
    require_nested(a_size, w_size, columns)
    bound *= 1 << 7
    if zero is not None:
        rows = rows.to(torch.int16) - _spread(zero.reshape(-1, zero.shape[-1]), a_size, columns).to(torch.int16)
        bound *= 2
    work = working_dtype(scale, dtype)
    left, right = scale.reshape(-1, scale.shape[-1]).to(work), effective(factors.scale, factors.scale2, work)
    step = min(a_size, w_size)
    total = scale.new_zeros((rows.shape[0], weight.shape[0]), dtype=work)
    for start in range(0, columns, step):
        product = exact_matmul(rows[:, start : start + step], weight[:, start : start + step], bound)
        share = left[:, start // a_size if left.shape[1] > 1 else 0].unsqueeze(1)
        factor = right[:, start // w_size].unsqueeze(0)
        if factors.minimum is None:
            total = total + product.to(work) * (share * factor)
        else:
            sums = rows[:, start : start + step].sum(1, dtype=torch.int32).to(work).unsqueeze(1)
            least = factors.minimum[:, start // w_size].to(work).unsqueeze(0)
            total = total + share * (product.to(work) * factor + sums * least)
    return total


def require_nested(a_size: int, w_size: int, columns: int) -> None:
    """Groups of activations and weights have to nest, so that a run of columns has one scale of each.

    Raises:
        FormatError: if they do not.
    """
    small, large = sorted((a_size, w_size))
    if large < columns and large % small:
        raise FormatError(
            f"groups of {a_size} activations and {w_size} weights along {columns} columns: expected one to divide the other; set group_size"
        )
