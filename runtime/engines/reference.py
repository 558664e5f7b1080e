"""The oracle: every step by its operator's reference; linears in tiles and attention row by row, so that no row depends on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.allowed import ALLOWED
from qcompile.ir.lowered import Step
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.engines.program import Call, Kernels, Operands
from qcompile.runtime.engines.weights import by_float_weight, float_weights
from qcompile.runtime.kv_cache import KVCache

ROWS = 16
"""Rows of a tile: one shape of matmul whatever the batch, so one order of summation."""
ATTENTION = ("qcompile.cache_attend.default", "qcompile.cache_attend_packed.default")
_FUNCTIONS = ("cos", "erf", "exp", "expm1", "gelu", "log", "log1p", "mish", "sigmoid", "silu", "sin", "softplus", "tanh")
BY_TOKEN = ("qcompile.gated_activation.default", "qcompile.rotary_table.default", *(f"aten.{name}.default" for name in _FUNCTIONS))
"""Torch computes these with vectors and the last few elements one by one, with other bits: what is last must not depend on the batch."""
LINEARS = ("aten.linear.default", "qcompile.quantized_linear.default")


class ReferenceEngine(PlanEngine):
    """Plain torch on the CPU. Quantized weights are dequantized once, which is what the operator's definition multiplies with."""

    name = "reference"

    def prepared_constants(self) -> Sequence[tuple[str, Tensor]]:
        """Codes of linears as the float weights [N, K] they stand for."""
        return [(name, tensor) for name, tensor, _ in float_weights(self.contents)]

    def kernels(self, cache: KVCache | None) -> Kernels:
        """Linears in tiles, attention row by row, activations token by token, all else by the operators."""
        del cache
        return _kernel


def _kernel(step: Step, operands: Operands) -> Call | None:
    if step.operator in ATTENTION:
        return lambda: attend_by_row(ALLOWED[step.operator], operands)
    if step.operator in BY_TOKEN:
        return lambda: call_by_token(ALLOWED[step.operator], operands)
    if step.operator not in LINEARS:
        return by_float_weight(step, operands)
    x, weight = operands.args[:2]
    bias = operands.args[2 if step.operator == LINEARS[0] else 4] if len(operands.args) > 2 else None
    return lambda: tiled_linear(x, weight, bias, operands.out)


def call_by_token(operator: Callable[..., Any], operands: Operands) -> None:
    """An element-wise operator on each [1, 1, ...] of its tensors [B, S, ...]."""
    leading = operands.out.shape[: max(1, min(2, operands.out.dim() - 1))]
    for place in product(*map(range, leading)):
        part = tuple(slice(index, index + 1) for index in place)
        args = [item[part] if isinstance(item, Tensor) and item.shape[: len(part)] == leading else item for item in operands.args]
        result = operator(*args, **operands.kwargs)
        for out, value in zip(operands.outputs, result if isinstance(result, tuple | list) else (result,), strict=True):
            out[part] = value


def attend_by_row(operator: Callable[..., Any], operands: Operands) -> None:
    """The operator on the real tokens [1, H, S', D] of one row after the other: neither the batch nor its padding sets a shape."""
    q, keys, values, page_table, positions, *options = operands.args
    operands.out.zero_()
    for row, places in enumerate(positions):
        real = (places >= 0).nonzero().squeeze(-1)
        if real.numel():
            queries = q[row : row + 1, :, real].contiguous()
            mixed = operator(queries, keys, values, page_table[row : row + 1], places[real].unsqueeze(0), *options, **operands.kwargs)
            operands.out[row, :, real] = mixed[0]


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`x Wᵀ + b` for x [..., K] and W [N, K], sixteen rows at a time, the last tile filled up with zeros."""
    rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for start in range(0, rows.shape[0], ROWS):
        tile = rows[start : start + ROWS]
        count = tile.shape[0]
        if count < ROWS:
            tile = torch.cat((tile, tile.new_zeros(ROWS - count, tile.shape[1])))
        result[start : start + count] = functional.linear(tile, weight, bias)[:count]
