"""The operators of `fused_activation_ops` with asymmetric codes: code int8 [..., K], scale [..., G] and zero int32 [..., G] come out.

Each is by definition its parts one after the other, the last of them `quantize_activation_asym`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.activation_ops import fake_asymmetric, quantize_activation_asym
from qcompile.ir.hadamard_ops import hadamard
from qcompile.ir.ops import add_rms_norm, define, gated_activation, rms_norm

_QUANTIZE = "Tensor? matrix, int hadamard_size, int bits, int group_size, float clip=1.0"
_CODES = "Tensor, Tensor, Tensor"
Codes = tuple[Tensor, Tensor, Tensor]


def _finish(x: Tensor, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, clip: float) -> Codes:
    return quantize_activation_asym(hadamard(x, matrix, hadamard_size) if hadamard_size else x, bits, group_size, clip)


def _fake_norm_quantize_asym(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, clip: float = 1.0,
) -> Codes:  # fmt: skip
    return fake_asymmetric(x, group_size)


@define(f"norm_quantize_asym(Tensor x, Tensor? weight, float eps, float offset, {_QUANTIZE}) -> ({_CODES})", _fake_norm_quantize_asym)
def norm_quantize_asym(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, clip: float = 1.0,
) -> Codes:  # fmt: skip
    """Codes, scale and zero of the rotated `rms_norm(x)`; x [..., K], weight [K]."""
    return _finish(rms_norm(x, weight, eps, offset), matrix, hadamard_size, bits, group_size, clip)


def _fake_add_norm_quantize_asym(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (torch.empty_like(x), *fake_asymmetric(x, group_size))


@define(
    f"add_norm_quantize_asym(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, {_QUANTIZE}) -> (Tensor, {_CODES})",
    _fake_add_norm_quantize_asym,
)
def add_norm_quantize_asym(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, matrix: Tensor | None, hadamard_size: int,
    bits: int, group_size: int, clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The residual sum `x + residual` [..., K], then codes, scale and zero of its rotated `rms_norm`."""
    total, normed = add_rms_norm(x, residual, weight, eps, offset)
    return (total, *_finish(normed, matrix, hadamard_size, bits, group_size, clip))


def _fake_gated_quantize_asym(
    gate: Tensor, up: Tensor, activation: str, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, clip: float = 1.0
) -> Codes:
    return fake_asymmetric(gate, group_size)


@define(f"gated_quantize_asym(Tensor gate, Tensor up, str activation, {_QUANTIZE}) -> ({_CODES})", _fake_gated_quantize_asym)
def gated_quantize_asym(
    gate: Tensor, up: Tensor, activation: str, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, clip: float = 1.0
) -> Codes:
    """Codes, scale and zero of the rotated `activation(gate) · up`; gate and up [..., K]."""
    return _finish(gated_activation(gate, up, activation), matrix, hadamard_size, bits, group_size, clip)


def _fake_hadamard_quantize_asym(
    x: Tensor, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, clip: float = 1.0
) -> Codes:
    return fake_asymmetric(x, group_size)


@define(f"hadamard_quantize_asym(Tensor x, {_QUANTIZE}) -> ({_CODES})", _fake_hadamard_quantize_asym)
def hadamard_quantize_asym(x: Tensor, matrix: Tensor | None, hadamard_size: int, bits: int, group_size: int, clip: float = 1.0) -> Codes:
    """Codes, scale and zero of the rotated x [..., K]."""
    return _finish(x, matrix, hadamard_size, bits, group_size, clip)
