"""Integers of 16 bits and more without a sign, of which torch does little but store them: computed in int64, exactly, or refused.

Bits, sums and products of the low bits are the same in int64, which wraps as the narrower type does. Up to 32 bits int64 holds every
number; of 64 bits, numbers are in order once the highest bit is turned round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.frontend.onnx.kinds import UNSIGNED
from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import Rule
from qcompile.frontend.onnx.values import Held, RefusalError, Value

MOVES = frozenset({
    "Cast", "CastLike", "DequantizeLinear", "QuantizeLinear", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten",
    "Concat", "Slice", "Split", "Shape", "Size", "Expand",
})  # fmt: skip
"""Operators that move bits and do no arithmetic."""
_BITS = frozenset({"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "Add", "Sub", "Mul", "Equal"})
_ORDER = frozenset({"Min", "Max", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_QUOTIENTS = frozenset({"Div", "Mod"})
_TURN = -(1 << 63)


def _tensor(value: Value) -> Any:
    return value.tensor if isinstance(value, Held) else value


def on_integers(node: Node, rule: Rule) -> Any:
    """What `rule` makes of a node; integers without a sign are int64 to it.

    Raises:
        RefusalError: for an operator that is not exact that way.
    """
    tensors = [found for value in node.inputs if isinstance(found := _tensor(value), Tensor)]
    held = {tensor.dtype for tensor in tensors} & set(UNSIGNED)
    if not held or node.operator in MOVES:
        return rule(node)
    long = torch.uint64 in held
    if node.operator not in (_BITS | _ORDER if long else _BITS | _ORDER | _QUOTIENTS) or len({tensor.dtype for tensor in tensors}) > 1:
        raise RefusalError(f"expected integers that torch computes with, got {next(iter(held))}")
    turned = long and node.operator in _ORDER
    node.inputs = [_signed(found, turned) if isinstance(found := _tensor(value), Tensor) else value for value in node.inputs]
    result = rule(node)
    if not isinstance(result, Tensor) or result.dtype != torch.int64:
        return result
    return (result + _TURN if turned else result).to(held.pop())


def _signed(x: Tensor, turned: bool) -> Tensor:
    wide = x.to(torch.int64)
    return wide + _TURN if turned else wide


def shift_right(x: Tensor, places: Tensor) -> Tensor:
    """Int64 that stands for numbers without a sign, by 0 to 63 places: zeros come in from the left."""
    mask = torch.bitwise_not(torch.bitwise_left_shift(torch.full_like(places, -2), 63 - places))
    return torch.bitwise_and(torch.bitwise_right_shift(x, places), mask)
