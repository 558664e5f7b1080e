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
from qcompile.runtime.engines.packed import INTEGER, QUANTIZED, exact_integer_linear
from qcompile.runtime.engines.program import Call, Kernels, Operands
from qcompile.runtime.engines.weights import Form, by_float_weight, prepared_weights
from qcompile.runtime.kv_cache import KVCache

ROWS = 16
"""Rows of a tile: one shape of matmul whatever the batch, so one order of summation."""
ATTENTION = ("qcompile.cache_attend.default", "qcompile.cache_attend_packed.default")
_FUNCTIONS = ("cos", "erf", "exp", "expm1", "gelu", "log", "log1p", "mish", "sigmoid", "silu", "sin", "softplus", "tanh")
BY_TOKEN = {
    "qcompile.gated_activation.default": 2, "qcompile.rotary_table.default": 1, **{f"aten.{name}.default": 1 for name in _FUNCTIONS},
    "qcompile.hadamard.default": 1, "qcompile.hadamard_quantize.default": 1, "qcompile.gated_quantize.default": 2,
    "qcompile.norm_quantize.default": 1, "qcompile.add_norm_quantize.default": 2, "qcompile.hadamard_quantize_asym.default": 1,
    "qcompile.norm_quantize_asym.default": 1, "qcompile.add_norm_quantize_asym.default": 2, "qcompile.gated_quantize_asym.default": 2,
}  # fmt: skip
"""Operator -> how many of its first arguments are rows [B, S, ...].

Torch computes these with vectors and the last few elements one by one, with other bits: what is last must not depend on the batch."""
LINEARS = ("aten.linear.default", QUANTIZED)


class ReferenceEngine(PlanEngine):
    """Plain torch on the CPU. Quantized weights are dequantized once, which is what the operator's definition multiplies with."""

    name = "reference"

    def prepared_constants(self) -> Sequence[tuple[str, Tensor]]:
        """Codes of quantized linears as the float weights [N, K] they stand for, those of integer linears as signed integers."""
        return [(name, tensor) for name, tensor, _ in prepared_weights(self.contents, _form)]

    def kernels(self, cache: KVCache | None) -> Kernels:
        """Linears in tiles, attention row by row, activations token by token, all else by the operators."""
        del cache
        return _kernel


def _form(step: Step, shared: bool) -> Form:
    """What the operators' definitions multiply with, made once."""
    if step.operator == INTEGER and not shared:
        return Form.INTEGERS
    return Form.FLOATS if step.operator == QUANTIZED else Form.PACKED


def _kernel(step: Step, operands: Operands) -> Call | None:
    if step.operator in ATTENTION:
        return lambda: attend_by_row(ALLOWED[step.operator], operands)
    if step.operator in BY_TOKEN:
        return lambda: call_by_token(ALLOWED[step.operator], operands, BY_TOKEN[step.operator])
    if step.operator == INTEGER:
        return exact_integer_linear(operands)
    if step.operator not in LINEARS or operands.args[1].dtype == torch.uint8:
        return by_float_weight(step, operands)
    x, weight = operands.args[:2]
    bias = operands.args[2 if step.operator == LINEARS[0] else 4] if len(operands.args) > 2 else None
    return lambda: tiled_linear(x, weight, bias, operands.out)


def call_by_token(operator: Callable[..., Any], operands: Operands, rows: int) -> None:
    """An operator on each [1, 1, ...] of its first `rows` arguments [B, S, ...]."""
    leading = operands.out.shape[: max(1, min(2, operands.out.dim() - 1))]
    for place in product(*map(range, leading)):
        part = tuple(slice(index, index + 1) for index in place)
        args = [item[part] if isinstance(item, Tensor) and item.shape[: len(part)] == leading else item for item in operands.args[:rows]]
        result = operator(*args, *operands.args[rows:], **operands.kwargs)
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
