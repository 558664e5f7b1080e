"""Rotations of activations as two small products, so that no matrix of the whole size is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.exporters.onnx.emitter import Emitter, Value
from qcompile.quant.hadamard import split_transform


def rotated(e: Emitter, x: Value, like: Any, matrix: Any, size: int) -> Value:
    """`qcompile::hadamard` of x, which has the sizes and the type of the node `like`, as `fast_hadamard` does it."""
    shape, dtype = e.shape(like), e.dtype(like)
    wide, leading = torch.promote_types(dtype, torch.float32), [0] * (len(shape) - 1)
    left, right = _factors(e, matrix, size, wide)
    rows, columns = (int(factor.shape[0]) for factor in (left, right))  # type: ignore[index, arg-type]
    blocks = [] if size == int(shape[-1]) else [int(shape[-1]) // size]
    grid = e.reshape(x if dtype == wide else e.cast(x, wide), [*leading, *blocks, rows, columns])
    grid = grid if columns == 1 else e.op("MatMul", grid, right)
    made = e.reshape(grid if rows == 1 else e.op("MatMul", left, grid), [*leading, int(shape[-1])])
    return made if dtype == wide else e.cast(made, dtype)


def _factors(e: Emitter, matrix: Any, size: int, dtype: torch.dtype) -> tuple[Value, Value]:
    """Both factors; the left one is made of the graph's matrix, if it has one."""
    if matrix is None:
        left, right = split_transform(None, size)
        return e.constant(left, dtype), e.constant(right, dtype)
    example = torch.empty(e.shape(matrix))
    left, right = split_transform(example, size)

    def change(tensor: Tensor) -> Tensor:
        return split_transform(tensor, size)[0].to(dtype)

    return e.from_constant(matrix, f"rotation{size}", dtype, left.shape, change), e.constant(right, dtype)
