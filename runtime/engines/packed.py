"""Steps that multiply with packed weights: where they find the parts, and how the integer ones run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.allowed import ALLOWED
from qcompile.ir.lowered import Step
from qcompile.quant import activations
from qcompile.runtime.engines.program import Call, Operands

QUANTIZED = "qcompile.quantized_linear.default"
INTEGER = "qcompile.integer_linear.default"
FLOAT8 = "qcompile.float8_linear.default"
PACKED_LINEARS = {QUANTIZED: 1, INTEGER: 3, FLOAT8: 2}
"""Operators whose weight is packed -> the place of its codes among their arguments."""


def named(step: Step) -> dict[str, Any]:
    """The step's arguments by the names of its operator's schema, defaults included."""
    schema = ALLOWED[step.operator]._schema.arguments  # type: ignore[attr-defined]
    given = {argument.name: value for argument, value in zip(schema, step.args, strict=False)} | dict(step.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


@dataclass(frozen=True)
class PackedWeight:
    """The parts of a step's weight by the names of their buffers, and how to read them.

    Attributes:
        x: the buffer whose last axis is the weight's columns.
        parts: buffers of codes, scale, zero and second scale, None for those it has not.
        bits: of a code.
        group_size: of the weight.
        element: `int` or the name of a float type.
        plain: whether it is symmetric with one scale per row and meets activations alike: one integer matmul says it all.
    """

    x: str
    parts: tuple[str | None, ...]
    bits: int
    group_size: int
    element: str
    plain: bool


def packed_weight(step: Step) -> PackedWeight:
    """The packed weight of a step whose operator is in `PACKED_LINEARS`."""
    given = named(step)
    prefix, x = ("", given["x"]) if step.operator == QUANTIZED else ("w_", given["codes"])
    parts = tuple(part and part["buffer"] for part in (given.get(f"{prefix}{name}") for name in ("codes", "scale", "zero", "scale2")))
    plain = step.operator == INTEGER and parts[2:] == (None, None) and given["zero"] is None
    plain = plain and given["group_size"] == given["w_group_size"] == -1
    element = "fp8" if step.operator == FLOAT8 else given.get("element", "int")
    return PackedWeight(x["buffer"], parts, given.get(f"{prefix}bits", 8), given[f"{prefix}group_size"], element, plain)


def exact_integer_linear(operands: Operands) -> Call | None:
    """The operator's definition over a weight that was unpacked to signed integers at load; None where it is packed."""
    codes, scale, zero, weight, w_scale, w_zero, bias, group_size, w_bits, w_group_size, dtype, w_scale2 = (*operands.args, None)[:12]
    if weight.dtype == torch.uint8:
        return None
    out = operands.out

    def run() -> None:
        bound = 1 << (w_bits - (w_zero is None))
        result = activations.integer_matmul(
            codes, scale, zero, weight, activations.WeightScales.of(w_scale, w_scale2, w_zero, w_group_size), group_size, bound, dtype
        )
        out.copy_((result if bias is None else result + bias.to(result.dtype)).to(dtype).view(out.shape))

    return run


def integer_matmul(operands: Operands) -> Call | None:
    """One int8 matmul with the scales behind it, for a weight [N, K] with one scale per row; None for any other.

    Measured on one core with VNNI (1536 x 576): one row 9 us beside 65 us for float32 in oneDNN's blocks, 128 rows 0.7 against 3.5 ms.
    """
    codes, scale, _, weight, w_scale, _, bias = operands.args[:7]
    if weight.dtype != torch.int8:
        return None
    rows, turned, out = codes.view(-1, codes.shape[-1]), weight.t(), operands.out
    result, left, right = out.view(-1, out.shape[-1]), scale.view(-1, 1), w_scale.to(torch.float32).view(1, -1)

    def run() -> None:
        total = torch._int_mm(rows, turned) * (left * right)
        result.copy_(total if bias is None else total + bias)

    return run


def dequantized_rows(operands: Operands) -> Tensor:
    """The activations of an integer or float8 linear as float32 [..., K]."""
    codes, scale = operands.args[:2]
    zero, group_size = (operands.args[2], operands.args[7]) if len(operands.args) > 9 else (None, operands.args[5])
    return activations.dequantize(codes, scale, zero, group_size, torch.float32)
