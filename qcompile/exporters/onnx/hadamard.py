"""Rotations of activations as small products, so that no matrix of the whole size is stored."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.exporters.onnx.emitter import Emitter, Value

_LARGEST = 64
"""Order of the largest factor of Sylvester's matrix that is one product."""


def rotated(e: Emitter, x: Value, like: Any, matrix: Any, size: int) -> Value:
    """`qcompile::hadamard` of x, which has the sizes and the type of the node `like`."""
    shape, dtype = e.shape(like), e.dtype(like)
    wide, leading = torch.promote_types(dtype, torch.float32), [0] * (len(shape) - 1)
    order = 1 if matrix is None else int(e.shape(matrix)[0])
    twos = size // order
    value = x if dtype == wide else e.cast(x, wide)
    if order > 1:
        value = e.reshape(value, [*leading, -1, order, twos])
        value = e.op("MatMul", e.value(matrix, wide), value)
    if twos > 1:
        value = _sylvester(e, value, leading, twos, wide)
    value = e.reshape(value, [*leading, int(shape[-1])])
    return value if dtype == wide else e.cast(value, dtype)


def _sylvester(e: Emitter, value: Value, leading: list[int], order: int, dtype: torch.dtype) -> Value:
    """Each run of `order` numbers by Sylvester's matrix over the root of its order."""
    factors = _factors(order)
    value = e.reshape(value, [*leading, -1, *factors])
    rank = len(leading) + 1 + len(factors)
    for place, factor in enumerate(factors):
        square = e.constant(_matrix(factor).to(dtype))
        if place == len(factors) - 1:
            value = e.op("MatMul", value, square)
        elif place == len(factors) - 2:
            value = e.op("MatMul", square, value)
        else:  # to the last axis and back; the matrix is symmetric
            axes = list(range(rank))
            here = len(leading) + 1 + place
            axes[here], axes[-1] = axes[-1], axes[here]
            value = e.transpose(e.op("MatMul", e.transpose(value, axes), square), axes)
    return value


def _factors(order: int) -> list[int]:
    """Powers of two of at most `_LARGEST` whose product is `order`."""
    factors = []
    while order > _LARGEST:
        factors.append(_LARGEST)
        order //= _LARGEST
    return [*factors, order]


def _matrix(order: int) -> torch.Tensor:
    """Sylvester's, over the root of its order: float64 [n, n]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.div(matrix, order**0.5)
