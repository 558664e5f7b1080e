"""The oracle: every step by its operator's reference; linears in tiles of rows, so that no row depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.lowered import Step
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.engines.program import Call, Kernels, Operands
from qcompile.runtime.engines.weights import float_weights
from qcompile.runtime.kv_cache import KVCache

ROWS = 16
"""Rows of a tile: one shape of matmul whatever the batch, so one order of summation."""
LINEARS = ("aten.linear.default", "qcompile.quantized_linear.default")


class ReferenceEngine(PlanEngine):
    """Plain torch on the CPU. Quantized weights are dequantized once, which is what the operator's definition multiplies with."""

    name = "reference"

    def prepared_constants(self) -> Sequence[tuple[str, Tensor]]:
        """Codes of linears as the float weights [N, K] they stand for."""
        return float_weights(self.contents, transposed=False)

    def kernels(self, cache: KVCache | None) -> Kernels:
        """Linears in tiles, all else by the operators."""
        del cache
        return _kernel


def _kernel(step: Step, operands: Operands) -> Call | None:
    if step.operator not in LINEARS:
        return None
    x, weight = operands.args[:2]
    bias = operands.args[2 if step.operator == LINEARS[0] else 4] if len(operands.args) > 2 else None
    return lambda: tiled_linear(x, weight, bias, operands.out)


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`x Wᵀ + b` for x [..., K] and W [N, K], sixteen rows at a time, the last tile filled up with zeros."""
    rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for start in range(0, rows.shape[0], ROWS):
        tile = rows[start : start + ROWS]
        count = tile.shape[0]
        if count < ROWS:
            tile = torch.cat((tile, tile.new_zeros(ROWS - count, tile.shape[1])))
        result[start : start + count] = functional.linear(tile, weight, bias)[:count]
