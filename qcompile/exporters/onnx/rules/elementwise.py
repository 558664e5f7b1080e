"""Arithmetic, comparisons and activations, number by number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument
from qcompile.exporters.onnx.rules.table import RULES, rule
from qcompile.ir.allowed import ALLOWED

_UNARY = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "neg": "Neg",
    "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round", "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt",
    "tan": "Tan", "tanh": "Tanh", "softplus": "Softplus", "mish": "Mish", "hardswish": "HardSwish", "isnan": "IsNaN", "isinf": "IsInf",
    "logical_not": "Not",
}  # fmt: skip
_BINARY = {
    "mul.Tensor": "Mul", "mul.Scalar": "Mul", "maximum.default": "Max", "minimum.default": "Min", "max.other": "Max", "min.other": "Min",
    "pow.Tensor_Scalar": "Pow", "pow.Tensor_Tensor": "Pow", "pow.Scalar": "Pow",
}  # fmt: skip
_COMPARED = {"eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}
_LOGICAL = {"logical_and.default": "And", "logical_or.default": "Or", "__and__.Tensor": "And", "__or__.Tensor": "Or"}
_BITWISE = {"bitwise_and.Tensor": "And", "bitwise_or.Tensor": "Or", "bitwise_xor.Tensor": "Xor"}


def _unary(operator: str) -> Any:
    def write(e: Emitter, node: Call) -> Value:
        x = e.value(node.args[0], _floating(e, node) if operator not in ("Not", "IsNaN", "IsInf") else None)
        return e.op(operator, x)

    return write


def _floating(e: Emitter, node: Call) -> torch.dtype:
    return e.dtype(node)


def _binary(operator: str) -> Any:
    def write(e: Emitter, node: Call) -> Value:
        return e.op(operator, *e.operands(node, *node.args[:2]))

    return write


def _compared(operator: str) -> Any:
    def write(e: Emitter, node: Call) -> Value:
        left, right = e.operands(node, *node.args[:2])
        return e.op("Not", e.op("Equal", left, right)) if operator == "ne" else e.op(operator, left, right)

    return write


def _logical(operator: str) -> Any:
    def write(e: Emitter, node: Call) -> Value:
        if e.dtype(node) == torch.bool:
            return e.op(operator, *(e.value(item, torch.bool) for item in node.args[:2]))
        return e.op(f"Bitwise{operator}", *e.operands(node, *node.args[:2]))

    return write


def _register() -> None:
    RULES.update(
        {ALLOWED[f"aten.{name}.default"]: _unary(operator) for name, operator in _UNARY.items() if f"aten.{name}.default" in ALLOWED}
    )
    RULES.update({ALLOWED[f"aten.{name}"]: _binary(operator) for name, operator in _BINARY.items() if f"aten.{name}" in ALLOWED})
    for name, operator in {**_COMPARED, "ne": "ne"}.items():
        RULES.update({ALLOWED[key]: _compared(operator) for kind in ("Tensor", "Scalar") if (key := f"aten.{name}.{kind}") in ALLOWED})
    RULES.update(
        {ALLOWED[f"aten.{name}"]: _logical(operator) for name, operator in {**_LOGICAL, **_BITWISE}.items() if f"aten.{name}" in ALLOWED}
    )


_register()


@rule("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar")
def add(e: Emitter, node: Call) -> Value:
    """Left plus or minus alpha times right."""
    left, right = e.operands(node, *node.args[:2])
    alpha = argument(node, 2, "alpha", 1)
    name = str(node.target)
    if name.startswith("aten.rsub"):
        left, right = right, left
    if alpha != 1:
        right = e.op("Mul", right, e.constant(alpha, e.dtype(node)))
    return e.op("Add" if name.startswith("aten.add") else "Sub", left, right)


@rule("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor", "aten.div.Tensor_mode", "aten.floor_divide.default")
def divide(e: Emitter, node: Call) -> Value:
    """True division, or rounded as its mode says."""
    mode = "floor" if "floor_divide" in str(node.target) else node.kwargs.get("rounding_mode")
    if mode is None:
        return e.op("Div", *(e.value(item, e.dtype(node)) for item in node.args[:2]))
    left, right = e.operands(node, *node.args[:2])
    if e.dtype(node).is_floating_point:
        quotient = e.op("Div", left, right)
        return e.op("Floor", quotient) if mode == "floor" else _towards_zero(e, quotient)
    if mode == "trunc":
        return e.op("Div", left, right)
    # ONNX divides integers towards zero: what is left over, of the divisor's sign, goes first.
    return e.op("Div", e.op("Sub", left, e.op("Mod", left, right)), right)


def _towards_zero(e: Emitter, x: Value) -> Value:
    return e.op("Mul", e.op("Sign", x), e.op("Floor", e.op("Abs", x)))


@rule("aten.remainder.Tensor", "aten.remainder.Scalar")
def remainder(e: Emitter, node: Call) -> Value:
    """Of the divisor's sign."""
    left, right = e.operands(node, *node.args[:2])
    if not e.dtype(node).is_floating_point:
        return e.op("Mod", left, right)
    return e.op("Sub", left, e.op("Mul", e.op("Floor", e.op("Div", left, right)), right))


@rule("aten.rsqrt.default")
def rsqrt(e: Emitter, node: Call) -> Value:
    """One over the square root."""
    return e.op("Reciprocal", e.op("Sqrt", e.value(node.args[0], e.dtype(node))))


@rule("aten.square.default")
def square(e: Emitter, node: Call) -> Value:
    """Times itself."""
    x = e.value(node.args[0])
    return e.op("Mul", x, x)


@rule("aten.expm1.default", "aten.log1p.default", "aten.log2.default")
def logarithms(e: Emitter, node: Call) -> Value:
    """In terms of exp and log."""
    dtype = e.dtype(node)
    x, one = e.value(node.args[0], dtype), e.constant(1.0, dtype)
    name = str(node.target)
    if "expm1" in name:
        return e.op("Sub", e.op("Exp", x), one)
    if "log1p" in name:
        return e.op("Log", e.op("Add", x, one))
    return e.op("Mul", e.op("Log", x), e.constant(1 / math.log(2), dtype))


@rule("aten.silu.default")
def silu(e: Emitter, node: Call) -> Value:
    """X times its sigmoid."""
    return activation(e, "silu", e.value(node.args[0]), e.dtype(node))


@rule("aten.gelu.default")
def gelu(e: Emitter, node: Call) -> Value:
    """Exact, or by tanh."""
    name = "gelu_tanh" if argument(node, 1, "approximate", "none") == "tanh" else "gelu"
    return activation(e, name, e.value(node.args[0]), e.dtype(node))


def activation(e: Emitter, name: str, x: Value, dtype: torch.dtype) -> Value:
    """One of the activations of `qcompile.ir.ops.ACTIVATIONS`."""
    if name == "relu":
        return e.op("Relu", x)
    if name == "silu":
        return e.op("Mul", x, e.op("Sigmoid", x))
    return e.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")


@rule("qcompile.gated_activation.default")
def gated_activation(e: Emitter, node: Call) -> Value:
    """Activation(gate) times up."""
    gate, up, name = node.args
    return e.op("Mul", activation(e, str(name), e.value(gate), e.dtype(node)), e.value(up))


@rule("aten.leaky_relu.default", "aten.elu.default", "aten.hardsigmoid.default", "aten.selu.default")
def with_slope(e: Emitter, node: Call) -> Value:
    """Activations with a number of their own."""
    x, name = e.value(node.args[0]), str(node.target)
    if "leaky" in name:
        return e.op("LeakyRelu", x, alpha=float(argument(node, 1, "negative_slope", 0.01)))
    if "hardsigmoid" in name:
        return e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    if "selu" in name:
        return e.op("Selu", x)
    if len(node.args) > 2 or "scale" in node.kwargs or "input_scale" in node.kwargs:
        raise e.refusal("expected elu without scales; ONNX has no other")
    return e.op("Elu", x, alpha=float(argument(node, 1, "alpha", 1.0)))


@rule("aten.prelu.default")
def prelu(e: Emitter, node: Call) -> Value:
    """A slope for each channel, axis 1."""
    slope: Any = node.args[1]
    rank = len(e.shape(node.args[0]))
    spread = e.reshape(e.value(slope), [-1, *[1] * (rank - 2)]) if rank > 2 else e.value(slope)
    return e.op("PRelu", e.value(node.args[0]), spread)


@rule(
    "aten.clamp.default",
    "aten.clamp_min.default",
    "aten.clamp_max.default",
    "aten.hardtanh.default",
    "aten.relu6.default",
    "aten.clamp.Tensor",
)
def clamp(e: Emitter, node: Call) -> Value:
    """Between two bounds, either of which may be left out."""
    dtype, name = e.dtype(node), str(node.target)
    if "relu6" in name:
        least, greatest = 0, 6
    elif "hardtanh" in name:
        least, greatest = argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
    elif "clamp_max" in name:
        least, greatest = None, argument(node, 1, "max")
    else:
        least, greatest = argument(node, 1, "min"), argument(node, 2, "max")
    x = e.value(node.args[0], dtype)
    if any(isinstance(bound, fx.Node) for bound in (least, greatest)):
        x = x if least is None else e.op("Max", x, e.value(least, dtype))
        return x if greatest is None else e.op("Min", x, e.value(greatest, dtype))
    return e.op("Clip", x, *(None if bound is None else e.constant(bound, dtype) for bound in (least, greatest)))


@rule("aten.where.self", "aten.where.Scalar", "aten.where.ScalarSelf", "aten.where.ScalarOther")
def where(e: Emitter, node: Call) -> Value:
    """One or the other."""
    dtype = e.dtype(node)
    return e.op("Where", e.value(node.args[0], torch.bool), e.value(node.args[1], dtype), e.value(node.args[2], dtype))


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(e: Emitter, node: Call) -> Value:
    """A number where the mask says so."""
    dtype = e.dtype(node)
    return e.op("Where", e.value(node.args[1], torch.bool), e.value(node.args[2], dtype), e.value(node.args[0], dtype))


@rule("aten.bitwise_not.default")
def bitwise_not(e: Emitter, node: Call) -> Value:
    """Of numbers or of truth values."""
    return e.op("Not" if e.dtype(node) == torch.bool else "BitwiseNot", e.value(node.args[0]))


@rule("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default", "aten.type_as.default")
def to(e: Emitter, node: Call) -> Value:
    """To the type of the result."""
    return e.value(node.args[0], e.dtype(node))


@rule(
    "aten.contiguous.default", "aten.clone.default", "aten.detach.default", "aten.detach_.default", "aten.dropout.default",
    "aten.lift_fresh_copy.default",
)  # fmt: skip
def same(e: Emitter, node: Call) -> Value:
    """What it was given."""
    return e.value(node.args[0])
