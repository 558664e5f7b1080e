"""One scale for a whole tensor, chosen on a sample of what it holds: its extremes, a percentile of them, or the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.activations import FLOAT8_MAX, dequantize, encode

METHODS = ("max", "percentile", "mse")
_MOST = 1 << 20
_SHARES = 36
_LEAST_SHARE = 0.3


def static_range(sample: Tensor, form: ActivationFormat, method: str = "mse", percentile: float = 0.9999) -> tuple[Tensor, Tensor | None]:
    """The scale float32 [1] and zero int32 [1] (None if symmetric) that the tensor behind `sample` (any shape) is quantized with.

    Args:
        sample: values the tensor took; at most a million, evenly spaced, are looked at.
        form: the format; its `clip` times the range found.
        method: `max` keeps the extremes, `percentile` the quantiles at `percentile` and 1 - `percentile`, `mse` the share of the
            extremes from 0.3 to 1 with the least squared error.
        percentile: between 0.5 and 1.

    Raises:
        FormatError: for an unknown method.
    """
    if method not in METHODS:
        raise FormatError(f"static range {method!r}: expected one of {', '.join(METHODS)}")
    values = sample.flatten().to(torch.float32)
    values = values[:: -(-values.numel() // _MOST)] if values.numel() > _MOST else values
    least, greatest = values.min().clamp(max=0), values.max().clamp(min=0)
    if method == "percentile":
        least, greatest = torch.quantile(values, 1 - percentile).clamp(max=0), torch.quantile(values, percentile).clamp(min=0)
    shares = torch.linspace(1, _LEAST_SHARE, _SHARES).tolist() if method == "mse" else [1.0]
    candidates = [_grid(least * share * form.clip, greatest * share * form.clip, form) for share in shares]
    return min(candidates, key=lambda grid: _error(values, grid, form)) if len(candidates) > 1 else candidates[0]


def _grid(least: Tensor, greatest: Tensor, form: ActivationFormat) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of the range; the symmetric integer scale keeps the sign of the extreme of larger magnitude."""
    bits, low = form.element.bits, -(1 << (form.element.bits - 1))
    if not form.element.is_integer:
        scale = torch.maximum(greatest, -least) / FLOAT8_MAX
    elif form.symmetric:
        scale = torch.where(greatest > -least, greatest, least) / low
    else:
        scale = (greatest - least) / ((1 << bits) - 1)
    scale = torch.where(scale != 0, scale, torch.ones_like(scale)).reshape(1)
    if form.symmetric:
        return scale, None
    return scale, ((-least / scale).round() + low).clamp(low, -low - 1).to(torch.int32)


def _error(values: Tensor, grid: tuple[Tensor, Tensor | None], form: ActivationFormat) -> float:
    scale, zero = grid
    codes = encode(values, scale, zero, form.element.bits, -1, form.element.kind)
    return float((dequantize(codes, scale, zero, -1, torch.float32) - values).square().mean())
