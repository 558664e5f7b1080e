"""How scales are stored: rounded to a float type, to a power of two, or to 8 bits under a second level of scales.

Shapes: scales are [N, G], one per row and group; the second level is float16 [N, H] (each row's groups in H runs of ceil(G / H)) for int8
scales (double quantization, QLoRA, arXiv:2305.14314), float32 [1, 1] for e4m3 (NVFP4), None for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import WeightError
from qcompile.quant.format import QuantFormat

_INT8_MAX = 127
_E4M3_MAX, _E4M3_LEAST = 448.0, 2.0**-9
_E8M0_MAX = 127
_HALF_LEAST = 2.0**-24
"""The smallest positive float16: GGUF stores scales down to it."""


def second_level(scale: Tensor, form: QuantFormat) -> Tensor | None:
    """The second level that just holds the scales [N, G]; None for a format without one."""
    if form.scale_dtype == torch.float8_e4m3fn:
        top = (scale.abs().amax() / _E4M3_MAX).float().reshape(1, 1)
        return top.clamp(min=torch.finfo(torch.float32).tiny)
    if form.scale_dtype != torch.int8:
        return None
    rows, groups = scale.shape
    runs = form.second_scales(groups)
    size = -(-groups // runs)
    padded = torch.nn.functional.pad(scale.abs(), (0, runs * size - groups))
    info = torch.finfo(torch.float16)
    return (padded.view(rows, runs, size).amax(-1) / _INT8_MAX).clamp(info.tiny, info.max).to(torch.float16)


def spread(scale2: Tensor, groups: int) -> Tensor:
    """The second level spread over the groups: [N, G], or [1, 1] as it is."""
    return scale2 if scale2.shape[1] == 1 else scale2.repeat_interleave(-(-groups // scale2.shape[1]), dim=1)[:, :groups]


def store(scale: Tensor, scale2: Tensor | None, form: QuantFormat, name: str) -> Tensor:
    """Scales as the format stores them, never 0: floats and 8-bit numbers to nearest, a power of two to the next that is no smaller.

    Raises:
        WeightError: for a scale beyond the range of the type, naming the weight.
    """
    if scale2 is not None:
        scale = scale / spread(scale2, scale.shape[1]).to(scale.dtype)
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    if form.scale_dtype == torch.int8:
        return (sign * scale.abs().round().clamp(1, _INT8_MAX)).to(torch.int8)
    if form.scale_dtype == torch.float8_e4m3fn:
        return (sign * scale.abs().clamp(_E4M3_LEAST, _E4M3_MAX)).to(form.scale_dtype)
    if form.scale_dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale.abs())
        exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-_E8M0_MAX, _E8M0_MAX)
        return torch.ldexp(torch.ones_like(scale), exponent).to(form.scale_dtype)
    info = torch.finfo(form.scale_dtype)
    if bool((scale.abs() > info.max).any()):
        raise WeightError(f"{name}: a scale of {scale.abs().max().item():.3g} does not fit {form.scale_dtype}; choose scale_dtype=float32")
    least = _HALF_LEAST if form.scale_dtype == torch.float16 else info.tiny
    return (sign * scale.abs().clamp(min=least)).to(form.scale_dtype)


def store_minimum(least: Tensor, form: QuantFormat, name: str) -> Tensor:
    """The values of code 0 [N, G] as the format stores them, to nearest.

    Raises:
        WeightError: for one beyond the range of the type, naming the weight.
    """
    if bool((least.abs() > torch.finfo(form.scale_dtype).max).any()):
        raise WeightError(
            f"{name}: a minimum of {least.abs().max().item():.3g} does not fit {form.scale_dtype}; choose a format with fp32 scales"
        )
    return least.to(form.scale_dtype)


def effective(scale: Tensor, scale2: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The scales [N, G] that stored ones stand for, as `dtype`."""
    if scale2 is None:
        return scale.to(dtype)
    return scale.to(dtype) * spread(scale2, scale.shape[1]).to(dtype)


def scale_bits(form: QuantFormat, rows: int, groups: int) -> int:
    """Bits stored for the scales of a matrix of `rows` rows, both levels."""
    second = {torch.int8: 16 * rows * form.second_scales(groups), torch.float8_e4m3fn: 32}.get(form.scale_dtype, 0)
    return rows * groups * form.scale_dtype.itemsize * 8 + second
