"""Operators that make quantized activations in one go: normalization, gated activation or rotation, then quantize.

Each is by definition its parts one after the other (every part rounding to the dtype of `x`), so fusing changes no bit; a kernel
may keep float32 between the parts. `hadamard_size` 0 means no rotation, otherwise blocks of that size are rotated by
`qcompile::hadamard` with `matrix`. Codes int8 [..., K] (float8_e4m3fn for element fp8), scale [..., G]; see `quantize_activation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.activation_ops import fake_codes, quantize_activation
from qcompile.ir.hadamard_ops import hadamard
from qcompile.ir.ops import add_rms_norm, define, gated_activation, rms_norm

_QUANTIZE = 'Tensor? matrix, int hadamard_size, int bits, int group_size, str element="int", float clip=1.0'


def _finish(
    x: Tensor, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, element: str, clip: float
) -> tuple[Tensor, Tensor]:
    return quantize_activation(hadamard(x, matrix, hadamard_size) if hadamard_size else x, bits, group_size, element, clip)


def _fake_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, element: str = "int", clip: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_codes(x, group_size, element)


@define(f"norm_quantize(Tensor x, Tensor? weight, float eps, float offset, {_QUANTIZE}) -> (Tensor, Tensor)", _fake_norm_quantize)
def norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, element: str = "int", clip: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scale of the rotated `rms_norm(x)`; x [..., K], weight [K]."""
    return _finish(rms_norm(x, weight, eps, offset), matrix, hadamard_size, bits, group_size, element, clip)


def _fake_add_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, element: str = "int", clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (torch.empty_like(x), *fake_codes(x, group_size, element))


@define(
    f"add_norm_quantize(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, {_QUANTIZE}) -> (Tensor, Tensor, Tensor)",
    _fake_add_norm_quantize,
)
def add_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, element: str = "int", clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The residual sum `x + residual` [..., K], then codes and scale of its rotated `rms_norm`."""
    total, normed = add_rms_norm(x, residual, weight, eps, offset)
    return (total, *_finish(normed, matrix, hadamard_size, bits, group_size, element, clip))


def _fake_gated_quantize(
    gate: Tensor, up: Tensor, activation: str, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, element: str = "int", clip: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_codes(gate, group_size, element)


@define(f"gated_quantize(Tensor gate, Tensor up, str activation, {_QUANTIZE}) -> (Tensor, Tensor)", _fake_gated_quantize)
def gated_quantize(
    gate: Tensor, up: Tensor, activation: str, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, element: str = "int", clip: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scale of the rotated `activation(gate) · up`; gate and up [..., K]."""
    return _finish(gated_activation(gate, up, activation), matrix, hadamard_size, bits, group_size, element, clip)


def _fake_hadamard_quantize(
    x: Tensor, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, element: str = "int", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    return fake_codes(x, group_size, element)


@define(f"hadamard_quantize(Tensor x, {_QUANTIZE}) -> (Tensor, Tensor)", _fake_hadamard_quantize)
def hadamard_quantize(
    x: Tensor, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, element: str = "int", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes and scale of the rotated x [..., K]."""
    return _finish(x, matrix, hadamard_size, bits, group_size, element, clip)
