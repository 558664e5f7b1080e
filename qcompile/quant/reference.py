"""Quantize, dequantize and pack in plain torch: the definition every kernel is judged against.

Shapes: a weight is [N, K] (output rows, input columns), in groups of g columns: G = ceil(K / g).
Codes are unsigned integers of b bits, `value - low`, packed along K into bytes, low bits first
(b = 4: byte j holds column 2j in its low and column 2j + 1 in its high nibble; the layout of onnxruntime's MatMulNBits).
Only 8-, 4- and 2-bit codes pack densely; other widths take the next of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import FormatError, WeightError
from qcompile.quant.scheme import QuantFormat

PACKED_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@dataclass(frozen=True)
class Quantized:
    """A packed weight: `codes` uint8 [N, ceil(K·b/8)], `scale` [N, G], `zero` uint8 [N, ceil(G·b/8)] or None if symmetric."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes uint8 [N, K] of `bits` bits into uint8 [N, ceil(K·b/8)], low bits first; the tail is 0."""
    width = PACKED_BITS[bits]
    per_byte = 8 // width
    if per_byte == 1:
        return codes.contiguous()
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % per_byte)).view(rows, -1, per_byte)
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8)
    for place in range(per_byte):
        packed |= padded[:, :, place] << (place * width)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack`: uint8 [N, ceil(K·b/8)] to unsigned codes uint8 [N, K]."""
    width = PACKED_BITS[bits]
    per_byte = 8 // width
    if per_byte == 1:
        return packed
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device) * width
    spread = (packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return spread.flatten(1)[:, :columns].contiguous()


def grouped(weight: Tensor, size: int) -> Tensor:
    """View [N, K] as [N, G, g], the last group padded with 0 where g does not divide K."""
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)


def per_column(values: Tensor, size: int, columns: int) -> Tensor:
    """Spread one value per group [N, G] over the columns: [N, K]."""
    return values.repeat_interleave(size, dim=1)[:, :columns]


def symmetric_scale(groups: Tensor, form: QuantFormat) -> Tensor:
    """Scale [N, G] that maps the extreme of larger magnitude to the lowest code, -2^(b-1).

    The extreme's sign is kept in the scale, so the side with one level more always serves the longer tail.
    A group of zeros gets scale 1, so that it dequantizes to exact zeros.
    """
    magnitude, index = groups.abs().max(dim=-1, keepdim=True)
    extreme = groups.gather(-1, index).squeeze(-1)
    return torch.where(magnitude.squeeze(-1) > 0, extreme / form.element.low, torch.ones_like(extreme))


def asymmetric_range(groups: Tensor, form: QuantFormat) -> tuple[Tensor, Tensor]:
    """Scale [N, G] and the least value [N, G] of each group, the range widened to contain 0."""
    least = groups.amin(-1).clamp(max=0)
    scale = (groups.amax(-1).clamp(min=0) - least) / (form.element.levels - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), least


def representable(scale: Tensor, form: QuantFormat, name: str) -> Tensor:
    """Round the scale to its storage type; a magnitude below the least normal number becomes that number, its sign kept."""
    info = torch.finfo(form.scale_dtype)
    if bool((scale.abs() > info.max).any()):
        raise WeightError(f"{name}: a scale of {scale.abs().max().item():.3g} does not fit {form.scale_dtype}; choose scale_dtype=float32")
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    return (sign * scale.abs().clamp(min=info.tiny)).to(form.scale_dtype)


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
    if weight.dim() != 2:
        raise FormatError(f"{name}: expected a matrix [N, K], got shape {tuple(weight.shape)}; leave it out with ignore=")
    values = weight.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        row, column = (int(i) for i in (~torch.isfinite(values)).nonzero()[0])
        raise WeightError(
            f"{name}[{row}, {column}] is {values[row, column].item()}: expected finite weights; repair the checkpoint or "
            "add the weight to ignore="
        )
    columns = values.shape[1]
    size = form.granularity.size(columns)
    groups = grouped(values, size)
    low, high = form.element.low, form.element.high
    if form.symmetric:
        scale = representable(symmetric_scale(groups, form), form, name)
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(low, high) - low
        zero = None
    else:
        raw, least = asymmetric_range(groups, form)
        scale = representable(raw, form, name)
        offset = (-least / scale.float()).round().clamp(0, form.element.levels - 1)
        codes = ((groups / scale.float().unsqueeze(-1)).round() + offset.unsqueeze(-1)).clamp(0, form.element.levels - 1)
        zero = pack(offset.to(torch.uint8), form.element.bits)
    packed = pack(codes.flatten(1)[:, :columns].to(torch.uint8), form.element.bits)
    return Quantized(packed, scale, zero)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Invert `quantize`: `(code - zero) · scale` as `dtype` [N, K]; without `zero` the zero point is 2^(b-1).

    Args:
        codes: uint8 [N, ceil(K·b/8)].
        scale: [N, G], a float type.
        zero: uint8 [N, ceil(G·b/8)] or None.
        bits: b.
        group_size: g, or -1 for one group per row.
        columns: K.
        dtype: the result's type; the product is computed in float32 and rounded once (float64 stays exact in float64).
    """
    size = columns if group_size == -1 else min(group_size, columns)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = unpack(codes, bits, columns).to(work)
    if zero is None:
        offset: Tensor | float = float(1 << (bits - 1))
    else:
        offset = per_column(unpack(zero, bits, scale.shape[1]).to(work), size, columns)
    return ((values - offset) * per_column(scale.to(work), size, columns)).to(dtype)


def stored_bits(form: QuantFormat, rows: int, columns: int) -> int:
    """Bits stored for one [N, K] weight: codes, scales, zero points."""
    width = PACKED_BITS[form.element.bits]
    groups = form.granularity.groups(columns)
    zeros = 0 if form.symmetric else -(-groups * width // 8) * 8
    return rows * (-(-columns * width // 8) * 8 + groups * torch.finfo(form.scale_dtype).bits + zeros)
