"""Element by element: arithmetic, comparisons, logic and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.kinds import UNSIGNED
from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import OWN, rule
from qcompile.frontend.onnx.unsigned import shift_right
from qcompile.frontend.onnx.values import Held, Numbers, RefusalError, is_symbolic, known_numbers

Operand = Any


def scalar(node: Node, index: int, dims: int) -> Any | None:
    """A constant of one element as a Python number, if an operand of `dims` dimensions can take it without growing; else None."""
    value = node.value(index)
    if isinstance(value, Held) and value.weight.numel == 1 and value.tensor.dtype not in (torch.bool, *UNSIGNED):
        value = known_numbers(value.weight)
    if isinstance(value, Numbers) and value.array.size == 1 and value.array.ndim <= dims and value.dtype != torch.bool:
        return value.flat[0]
    return None


def operands(node: Node) -> tuple[Operand, Operand]:
    """Both operands; at most one of them is a Python number."""
    left = node.tensor(0)
    right = scalar(node, 1, left.dim())
    if right is not None:
        return left, right
    other = node.tensor(1)
    number = scalar(node, 0, other.dim())
    return (left if number is None else number), other


def _divide(left: Operand, right: Operand) -> Tensor:
    whole = not (left if isinstance(left, Tensor) else right).dtype.is_floating_point
    if not whole:
        divided: Tensor = left / right
        return divided
    return torch.div(torch.as_tensor(left), right, rounding_mode="trunc")


def _power(left: Operand, right: Operand) -> Tensor:
    if not isinstance(left, Tensor):
        return torch.pow(torch.full((), left, dtype=right.dtype), right) if isinstance(left, int) else torch.pow(left, right)
    raised = torch.pow(left, right)
    return raised if raised.dtype == left.dtype else raised.to(left.dtype)


_BINARY: dict[str, Callable[[Operand, Operand], Tensor]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "Div": _divide, "Pow": _power,
    "Equal": lambda a, b: a == b, "Less": lambda a, b: a < b, "LessOrEqual": lambda a, b: a <= b, "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
}  # fmt: skip


@rule(*_BINARY)
def binary(node: Node) -> Tensor:
    """Two operands, with broadcasting; a constant of one element becomes a Python number."""
    if node.attribute("axis") is not None or node.attribute("broadcast") is not None:
        raise RefusalError("expected broadcasting as in opset 7 and later, got an attribute of an earlier one")
    return _BINARY[node.operator](*operands(node))


_LOGIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": lambda a, b: a != b, "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


@rule(*_LOGIC)
def logic(node: Node) -> Tensor:
    """Two tensors of booleans, or bit by bit."""
    return _LOGIC[node.operator](node.tensor(0), node.tensor(1))


@rule("Mod")
def modulo(node: Node) -> Tensor:
    """The divisor's sign, or with `fmod` the dividend's."""
    left, right = operands(node)
    if node.flag("fmod"):
        return torch.fmod(torch.as_tensor(left), right)
    return torch.remainder(left, right)


@rule("BitShift")
def shift(node: Node) -> Tensor:
    """Left or right, of integers without a sign; wide ones come in int64."""
    left, right = node.tensor(0), node.tensor(1)
    if node.required("direction") == "LEFT":
        return torch.bitwise_left_shift(left, right)
    return shift_right(left, right) if left.dtype == torch.int64 else torch.bitwise_right_shift(left, right)


_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Sum": torch.add, "Min": torch.minimum, "Max": torch.maximum, "Mean": torch.add}


@rule(*_VARIADIC)
def variadic(node: Node) -> Tensor:
    """Any number of operands."""
    if len(node.inputs) == 2 and node.operator in ("Min", "Max"):
        left, right = operands(node)
        if not isinstance(left, Tensor):
            left, right = right, left
        if not isinstance(right, Tensor):
            return torch.clamp(left, max=right) if node.operator == "Min" else torch.clamp(left, min=right)
    total = reduce(_VARIADIC[node.operator], node.tensors())
    return total / len(node.inputs) if node.operator == "Mean" else total


@rule("Where")
def where(node: Node) -> Tensor:
    """Chosen by a condition; a constant of one element becomes a Python number where the other operand has the dtype."""
    condition = node.tensor(0)
    values: list[Any] = [node.tensor(1), node.tensor(2)]
    plain = values[0].dtype in (torch.float32, torch.int64)  # what torch makes of two numbers
    for index in (1, 0):
        number = scalar(node, index + 1, condition.dim())
        if number is not None and not is_symbolic(number) and (plain or isinstance(values[1 - index], Tensor)):
            values[index] = number
    chosen: Tensor = torch.where(condition, values[0], values[1])
    return chosen


@rule("Clip")
def clip(node: Node) -> Tensor:
    """Limits as attributes or as inputs; where they cross, the upper one holds."""
    x = node.tensor(0)
    lowest, highest = _limit(node, "min", 1), _limit(node, "max", 2)
    if lowest is None and highest is None:
        return x
    if isinstance(lowest, Tensor) or isinstance(highest, Tensor):
        x = x if lowest is None else torch.maximum(x, torch.as_tensor(lowest, dtype=x.dtype))
        return x if highest is None else torch.minimum(x, torch.as_tensor(highest, dtype=x.dtype))
    return torch.clamp(x, lowest, highest)


def _limit(node: Node, name: str, index: int) -> Any:
    if node.attribute(name) is not None:
        return node.real(name, 0.0)
    if not node.has(index):
        return None
    number = scalar(node, index, 0)
    return node.tensor(index) if number is None else number


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal,
    "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign, "Erf": torch.erf, "Sin": torch.sin,
    "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan, "Sinh": torch.sinh,
    "Cosh": torch.cosh, "Tanh": torch.tanh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh, "Relu": torch.relu,
    "Sigmoid": torch.sigmoid, "HardSwish": F.hardswish, "Mish": F.mish, "Softplus": F.softplus, "Softsign": lambda x: x / (1 + x.abs()),
    "IsNaN": torch.isnan, "Not": torch.logical_not, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip


@rule(*_UNARY)
def unary(node: Node) -> Tensor:
    """One operand and nothing else."""
    return _UNARY[node.operator](node.tensor(0))


@rule("Rsqrt", domain=OWN)
def inverse_root(node: Node) -> Tensor:
    """1 / sqrt(x)."""
    return torch.rsqrt(node.tensor(0))


@rule("Identity")
def identity(node: Node) -> Any:
    """Whatever it is."""
    return node.value(0)


@rule("IsInf")
def is_infinite(node: Node) -> Tensor:
    """Infinities of either sign, or of one."""
    x, below, above = node.tensor(0), node.flag("detect_negative", True), node.flag("detect_positive", True)
    if below and above:
        return torch.isinf(x)
    if not below and not above:
        return torch.zeros_like(x, dtype=torch.bool)
    return x == (math.inf if above else -math.inf)


@rule("Gelu")
def gelu(node: Node) -> Tensor:
    """By the error function, or approximately by tanh."""
    return F.gelu(node.tensor(0), approximate=node.text("approximate", "none"))


@rule("Swish")
def swish(node: Node) -> Tensor:
    """X · sigmoid(alpha · x)."""
    x, alpha = node.tensor(0), node.real("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@rule("LeakyRelu")
def leaky_relu(node: Node) -> Tensor:
    """X above 0, alpha · x below."""
    return F.leaky_relu(node.tensor(0), node.real("alpha", 0.01))


@rule("Elu")
def elu(node: Node) -> Tensor:
    """X above 0, alpha (exp(x) - 1) below."""
    return F.elu(node.tensor(0), node.real("alpha", 1.0))


@rule("Celu")
def celu(node: Node) -> Tensor:
    """X above 0, alpha (exp(x / alpha) - 1) below: an elu of x / alpha."""
    x, alpha = node.tensor(0), node.real("alpha", 1.0)
    return F.elu(x) if alpha == 1 else F.elu(x / alpha) * alpha


@rule("Selu")
def selu(node: Node) -> Tensor:
    """Gamma times an elu; torch knows the usual constants."""
    x, alpha, gamma = node.tensor(0), node.real("alpha", 1.6732632), node.real("gamma", 1.050701)
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return F.selu(x)
    return F.elu(x, alpha) * gamma


@rule("HardSigmoid")
def hard_sigmoid(node: Node) -> Tensor:
    """Alpha · x + beta, between 0 and 1."""
    x, alpha, beta = node.tensor(0), node.real("alpha", 0.2), node.real("beta", 0.5)
    return F.hardsigmoid(x) if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5 else torch.clamp(x * alpha + beta, 0, 1)


@rule("ThresholdedRelu")
def thresholded_relu(node: Node) -> Tensor:
    """The elements above alpha, else 0."""
    x = node.tensor(0)
    return torch.where(x > node.real("alpha", 1.0), x, 0.0)


@rule("Shrink")
def shrink(node: Node) -> Tensor:
    """Towards 0 by a bias, outside of [-λ, λ]; 0 inside."""
    x, limit, bias = node.tensor(0), node.real("lambd", 0.5), node.real("bias", 0.0)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@rule("PRelu")
def prelu(node: Node) -> Tensor:
    """X above 0, slope · x below; the slope broadcasts to x."""
    x, slope = node.tensor(0), node.tensor(1)
    return torch.where(x < 0, x * slope, x)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: Node) -> Tensor:
    """Along one axis; before opset 13 over all axes from that one on."""
    x = node.tensor(0)
    axis = node.integer("axis", -1 if node.opset >= 13 else 1) % max(x.dim(), 1)
    function = _ALONG[node.operator]
    if node.opset >= 13 or axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    """1 at the first largest element, 0 elsewhere."""
    first = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1.0)


_ALONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": lambda x, axis: torch.softmax(x, axis), "LogSoftmax": lambda x, axis: torch.log_softmax(x, axis), "Hardmax": _hardmax,
}  # fmt: skip


@rule("Dropout")
def dropout(node: Node) -> tuple[Any, ...]:
    """Nothing at inference; its mask is all true."""
    node.ignore("ratio", "seed", "is_test")
    node.has(1)
    if node.has(2) and any(node.elements(2, "training_mode")):
        raise RefusalError("expected inference, got dropout in training mode")
    x = node.value(0)
    return x, (torch.ones_like(node.tensor(0), dtype=torch.bool) if node.wants(1) else None)
