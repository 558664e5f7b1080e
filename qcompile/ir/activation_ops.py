"""The `qcompile::` operators of quantized activations: codes in, integer or float8 matmul, scales in the epilogue.

The arithmetic, its shapes and the meaning of codes, scales and zero points stand in `qcompile.quant.activations`. A group size of -1
is one group per token (activations) or per output row (weights). Weights keep the packed layout of `qcompile.quant.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.ops import define
from qcompile.quant import activations

_FLOAT8_BOUND = 1 << 36
"""Products of float8 are multiples of 2^-18 below 2^18: what float64 adds exactly and float32 does not."""


def _groups(x: Tensor, group_size: int) -> int:
    return -(-x.shape[-1] // activations.group_columns(x.shape[-1], group_size))


def _code_dtype(element: str) -> torch.dtype:
    return torch.float8_e4m3fn if element == "fp8" else torch.int8


def fake_codes(x: Tensor, group_size: int, element: str) -> tuple[Tensor, Tensor]:
    """Empty codes and scale for x [..., K], contiguous."""
    codes = x.new_empty(x.shape, dtype=_code_dtype(element))
    return codes, x.new_empty((*x.shape[:-1], _groups(x, group_size)), dtype=activations.scale_dtype(x.dtype, group_size))


def _fake_quantize(x: Tensor, bits: int, group_size: int, element: str = "int", clip: float = 1.0) -> tuple[Tensor, Tensor]:
    return fake_codes(x, group_size, element)


@define(
    'quantize_activation(Tensor x, int bits, int group_size, str element="int", float clip=1.0) -> (Tensor, Tensor)',
    _fake_quantize,
)
def quantize_activation(x: Tensor, bits: int, group_size: int, element: str = "int", clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Symmetric codes [..., K] and scale [..., G] of x [..., K], each group by its own extreme times `clip`.

    The scale keeps the extreme's sign (`clip · extreme / -2^(b-1)`), so it can be negative; see `activations.dynamic_scale`.
    """
    return activations.quantize(x.contiguous(), bits, group_size, element, clip)


def fake_asymmetric(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty codes, scale and zero point for x [..., K], contiguous."""
    codes, scale = fake_codes(x, group_size, "int")
    return codes, scale, torch.empty_like(scale, dtype=torch.int32)


def _fake_quantize_asym(x: Tensor, bits: int, group_size: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return fake_asymmetric(x, group_size)


@define(
    "quantize_activation_asym(Tensor x, int bits, int group_size, float clip=1.0) -> (Tensor, Tensor, Tensor)",
    _fake_quantize_asym,
)
def quantize_activation_asym(x: Tensor, bits: int, group_size: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [..., K], scale [..., G] and zero int32 [..., G] with `x ≈ (code - zero) · scale`."""
    return activations.quantize_asymmetric(x.contiguous(), bits, group_size, clip)


def _fake_quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, element: str = "int") -> Tensor:
    return x.new_empty(x.shape, dtype=_code_dtype(element))


@define('quantize_static(Tensor x, Tensor scale, Tensor? zero, int bits, str element="int") -> Tensor', _fake_quantize_static)
def quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, element: str = "int") -> Tensor:
    """Codes of x (any shape) by a scale [1] and a zero int32 [1] that are constants of the model; values outside saturate."""
    return activations.encode(x.contiguous(), scale, zero, bits, -1, element)


def _fake_dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@define(
    "dequantize_activation(Tensor codes, Tensor scale, Tensor? zero, int group_size, ScalarType dtype) -> Tensor",
    _fake_dequantize,
)
def dequantize_activation(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """`(code - zero) · scale` [..., K] as `dtype`."""
    return activations.dequantize(codes.contiguous(), scale, zero, group_size, dtype)


def _finish(total: Tensor, codes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total.to(dtype).view(*codes.shape[:-1], total.shape[-1])


def _fake_integer_linear(
    codes: Tensor, scale: Tensor, zero: Tensor | None, w_codes: Tensor, w_scale: Tensor, w_zero: Tensor | None, bias: Tensor | None,
    group_size: int, w_bits: int, w_group_size: int, dtype: torch.dtype, w_scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], w_codes.shape[0]), dtype=dtype)


@define(
    "integer_linear(Tensor codes, Tensor scale, Tensor? zero, Tensor w_codes, Tensor w_scale, Tensor? w_zero, Tensor? bias, "
    "int group_size, int w_bits, int w_group_size, ScalarType dtype, Tensor? w_scale2=None) -> Tensor",
    _fake_integer_linear,
)
def integer_linear(
    codes: Tensor, scale: Tensor, zero: Tensor | None, w_codes: Tensor, w_scale: Tensor, w_zero: Tensor | None, bias: Tensor | None,
    group_size: int, w_bits: int, w_group_size: int, dtype: torch.dtype, w_scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`Σ_g scale_g · w_scale_g · Σ_k (code - zero)(w_code - w_zero) + bias` as `dtype` [..., N]; the inner sum is exact (int32).

    codes int8 [..., K], scale [..., G] or [1], zero int32 alike or None, w_codes uint8 [N, ceil(K·b/8)], w_scale [N, Gw], w_zero packed
    uint8, minima [N, Gw] in the dtype of w_scale (then a run gives `scale_g · (w_scale_g · Σ_k (code - zero) · w_code + w_zero_g · Σ_k
    (code - zero))`), or None (2^(b-1)), bias [N], w_scale2 the scales' second level (`qcompile.quant.scales`). Of the
    two group sizes one divides the other. Groups add up in order, in float32 (float64 for a float64 scale or `dtype`).
    """
    weight = activations.signed_weight(w_codes, w_zero, w_bits, w_group_size, codes.shape[-1])
    factors = activations.WeightScales.of(w_scale, w_scale2, w_zero, w_group_size)
    bound = 1 << (w_bits - (w_zero is None))
    return _finish(activations.integer_matmul(codes, scale, zero, weight, factors, group_size, bound, dtype), codes, bias, dtype)


def _fake_float8_linear(
    codes: Tensor, scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None,
    group_size: int, w_group_size: int, dtype: torch.dtype, w_scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], w_codes.shape[0]), dtype=dtype)


@define(
    "float8_linear(Tensor codes, Tensor scale, Tensor w_codes, Tensor w_scale, Tensor? bias, int group_size, int w_group_size, "
    "ScalarType dtype, Tensor? w_scale2=None) -> Tensor",
    _fake_float8_linear,
)
def float8_linear(
    codes: Tensor, scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None,
    group_size: int, w_group_size: int, dtype: torch.dtype, w_scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`Σ_g scale_g · w_scale_g · Σ_k code · w_code + bias` as `dtype` [..., N] of float8_e4m3fn codes [..., K] and w_codes [N, K].

    `w_codes` may come as the uint8 bytes of float8_e4m3fn. The inner sum is exact: products of float8 are multiples of 2^-18 up
    to 2^18, which float64 adds without rounding; a kernel that adds them in float32 differs by that rounding.
    """
    weight = w_codes.view(torch.float8_e4m3fn) if w_codes.dtype == torch.uint8 else w_codes
    factors = activations.WeightScales(w_scale, w_scale2, w_group_size)
    return _finish(activations.integer_matmul(codes, scale, None, weight, factors, group_size, _FLOAT8_BOUND, dtype), codes, bias, dtype)


def _fake_integer_conv2d(
    codes: Tensor, scale: Tensor, zero: Tensor | None, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, w_bits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = codes.new_empty((w_codes.shape[0], codes.shape[1] // groups, *kernel), dtype=dtype)
    return torch.conv2d(codes.to(dtype), weight, None, stride, padding, dilation, groups)


@define(
    "integer_conv2d(Tensor codes, Tensor scale, Tensor? zero, Tensor w_codes, Tensor w_scale, Tensor? bias, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups, int w_bits, ScalarType dtype) -> Tensor",
    _fake_integer_conv2d,
)
def integer_conv2d(
    codes: Tensor, scale: Tensor, zero: Tensor | None, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, w_bits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`scale · w_scale · conv2d(code - zero, w_code - 2^(b-1)) + bias` as `dtype` [B, N, H', W']; the convolution is exact (int32).

    codes int8 [B, C, H, W], scale [1], zero int32 [1] or None, w_codes uint8 [N, ceil(C/groups·h·w·b/8)], w_scale [N, 1], bias [N],
    kernel (h, w). What pads the codes stands for 0.
    """
    columns = codes.shape[1] // groups * kernel[0] * kernel[1]
    weight = activations.signed_weight(w_codes, None, w_bits, -1, columns).view(w_codes.shape[0], -1, *kernel)
    x = codes.to(torch.int16) if zero is None else codes.to(torch.int16) - zero.to(torch.int16)
    bound = 1 << (7 + (zero is not None) + w_bits - 1)
    # A GPU's library may pick a fast convolution that rounds; none is made for float64.
    work = activations.exact_dtype(bound, columns) if codes.device.type == "cpu" else torch.float64
    total = torch.conv2d(x.to(work), weight.to(work), None, stride, padding, dilation, groups).to(scale.dtype)
    total = total * (scale * w_scale.to(scale.dtype).flatten()).view(1, -1, 1, 1)
    return (total if bias is None else total + bias.to(total.dtype).view(1, -1, 1, 1)).to(dtype)
