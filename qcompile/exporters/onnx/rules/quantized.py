"""Quantized weights and activations: what is stored, what it stands for, and products of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument
from qcompile.exporters.onnx.hadamard import rotated
from qcompile.exporters.onnx.rules.elementwise import activation
from qcompile.exporters.onnx.rules.linear import biased
from qcompile.exporters.onnx.rules.normalization import normalized
from qcompile.exporters.onnx.rules.table import rule
from qcompile.exporters.onnx.weights import Weight, exact_integers, multiply, numbers, rows_of

_FLOAT8_MAX = 448.0
_HALF_LEAST, _HALF_MAX = 2.0**-24, 65504.0


def weight_of(node: Call, columns: int) -> Weight:
    """The weight of a `quantized_linear` or `dequantize`."""
    linear = "quantized_linear" in str(node.target)
    codes, scale, zero = node.args[1:4] if linear else node.args[:3]
    first = 5 if linear else 3
    bits, group = node.args[first : first + 2]
    element, scale2 = (argument(node, place, name, default) for place, name, default in (
        (7, "element", "int"), (8, "scale2", None)))  # fmt: skip
    return Weight(codes, scale, zero, scale2, int(bits), int(group), columns, str(element))


@rule("qcompile.quantized_linear.default")
def quantized_linear(e: Emitter, node: Call) -> Value:
    """X times a packed weight, plus the bias."""
    x: Any = node.args[0]
    weight = weight_of(node, int(e.shape(x)[-1]))
    return biased(e, multiply(e, e.value(x), weight, e.dtype(x)), node.args[4])


@rule("qcompile.dequantize.default")
def dequantize(e: Emitter, node: Call) -> Value:
    """A packed weight as numbers [N, K]."""
    dtype: Any = node.args[6] if len(node.args) > 6 else node.kwargs["dtype"]
    weight = weight_of(node, int(node.args[5]))
    return numbers(e, weight, dtype)


@rule("qcompile.quantized_embedding.default")
def quantized_embedding(e: Emitter, node: Call) -> Value:
    """Rows of a packed table, unpacked after they are taken."""
    indices, codes, scale, zero, bits, group, columns, dtype = node.args[:8]
    element, scale2 = argument(node, 8, "element", "int"), argument(node, 9, "scale2", None)
    weight = Weight(codes, scale, zero, scale2, int(bits), int(group), int(columns), str(element))
    return rows_of(e, e.value(indices), weight, dtype)


# Activations


@dataclass(frozen=True)
class Rounding:
    """How activations [..., K] are rounded while running."""

    bits: int
    group_size: int
    element: str = "int"
    clip: float = 1.0
    asymmetric: bool = False

    @property
    def low(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1))

    def group(self, columns: int) -> int:
        """Columns of a full group."""
        return columns if self.group_size == -1 else min(self.group_size, columns)


def quantized(e: Emitter, x: Value, like: Any, rounding: Rounding) -> tuple[Value, ...]:
    """Codes [..., K], scale [..., G] and, if asymmetric, zero int32 [..., G] of x, which has the sizes and the type of the node `like`."""
    shape, dtype = e.shape(like), e.dtype(like)
    wide = torch.promote_types(dtype, torch.float32)
    value = x if dtype == wide else e.cast(x, wide)
    columns, rank = int(shape[-1]), len(shape)
    group = rounding.group(columns)
    grouped = _grouped(e, value, columns, group, rank)
    bounds = [e.op(name, grouped, e.ints([-1]), keepdims=1) for name in ("ReduceMin", "ReduceMax")]
    scale, zero = _range(e, bounds[0], bounds[1], rounding, wide)
    codes = _codes(e, grouped, scale, zero, rounding, wide)
    if group != columns:
        codes = e.slice(e.reshape(codes, [*[0] * (rank - 1), -1]), rank - 1, 0, columns)
        scale, zero = e.op("Squeeze", scale, e.ints([-1])), None if zero is None else e.op("Squeeze", zero, e.ints([-1]))
    stored = e.cast(scale, torch.float16) if rounding.group_size != -1 else scale
    return (codes, stored) if zero is None else (codes, stored, e.cast(zero, torch.int32))


def _grouped(e: Emitter, value: Value, columns: int, group: int, rank: int) -> Value:
    """[..., G, g], or as it is where a token is one group."""
    if group == columns:
        return value
    missing = -columns % group
    if missing:
        value = e.op("Pad", value, e.ints([*[0] * (2 * rank - 1), missing]))
    return e.reshape(value, [*[0] * (rank - 1), -1, group])


def _range(e: Emitter, least: Value, greatest: Value, rounding: Rounding, dtype: torch.dtype) -> tuple[Value, Value | None]:
    """Scale and zero point; see `qcompile.quant.activations.dynamic_scale`."""
    if rounding.asymmetric:
        clip, nought = e.constant(rounding.clip, dtype), e.constant(0.0, dtype)
        least, greatest = e.op("Mul", e.op("Min", least, nought), clip), e.op("Mul", e.op("Max", greatest, nought), clip)
        wide = e.op("Sub", greatest, least)
        scale = _stored(e, e.op("Div", wide, e.constant(float((1 << rounding.bits) - 1), dtype)), rounding, dtype)
        place = e.op("Add", e.op("Round", e.op("Neg", e.op("Div", least, scale))), e.constant(float(rounding.low), dtype))
        return scale, e.op("Clip", place, e.constant(float(rounding.low), dtype), e.constant(float(-rounding.low - 1), dtype))
    low = e.op("Neg", least)
    if rounding.element == "fp8":
        scale = e.op("Mul", e.op("Max", greatest, low), e.constant(rounding.clip / _FLOAT8_MAX, dtype))
    else:
        extreme = e.op("Where", e.op("Greater", greatest, low), greatest, least)
        scale = e.op("Mul", extreme, e.constant(rounding.clip / rounding.low, dtype))
    return _stored(e, scale, rounding, dtype), None


def _stored(e: Emitter, scale: Value, rounding: Rounding, dtype: torch.dtype) -> Value:
    """1 for 0; rounded to float16 where groups have scales, and back."""
    scale = e.op("Where", e.op("Equal", scale, e.constant(0.0, dtype)), e.constant(1.0, dtype), scale)
    if rounding.group_size == -1:
        return scale
    size = e.op("Clip", e.op("Abs", scale), e.constant(_HALF_LEAST, dtype), e.constant(_HALF_MAX, dtype))
    return e.cast(e.cast(e.op("Mul", e.op("Sign", scale), size), torch.float16), dtype)


def _codes(e: Emitter, x: Value, scale: Value, zero: Value | None, rounding: Rounding, dtype: torch.dtype) -> Value:
    """`clip(round(x / scale) + zero)` as int8, or float8."""
    scaled = e.op("Div", x, scale)
    if rounding.element == "fp8":
        clipped = e.op("Clip", scaled, e.constant(-_FLOAT8_MAX, dtype), e.constant(_FLOAT8_MAX, dtype))
        return e.cast(clipped, torch.float8_e4m3fn)
    near = e.op("Round", scaled)
    near = near if zero is None else e.op("Add", near, zero)
    ends = e.constant(float(rounding.low), dtype), e.constant(float(-rounding.low - 1), dtype)
    return e.cast(e.op("Clip", near, *ends), torch.int8)


@rule("qcompile.quantize_activation.default", "qcompile.quantize_activation_asym.default")
def quantize_activation(e: Emitter, node: Call) -> tuple[Value, ...]:
    """Codes and scales of a value."""
    asymmetric = "asym" in str(node.target)
    return quantized(e, e.value(node.args[0]), node.args[0], _rounding(node, 1, asymmetric))


def _rounding(node: Call, first: int, asymmetric: bool) -> Rounding:
    """From arguments that begin with bits and group size."""
    bits, group = node.args[first : first + 2]
    made = Rounding(int(bits), int(group), asymmetric=asymmetric)
    if asymmetric:
        return replace(made, clip=float(argument(node, first + 2, "clip", 1.0)))
    return replace(made, element=str(argument(node, first + 2, "element", "int")), clip=float(argument(node, first + 3, "clip", 1.0)))


def _finished(e: Emitter, node: Call, x: Value, like: Any, first: int) -> tuple[Value, ...]:
    """Rotation, if there is one, then codes and scales: arguments begin with the matrix at `first`."""
    matrix, size = node.args[first : first + 2]
    if size:
        x = rotated(e, x, like, matrix, int(size))
    return quantized(e, x, like, _rounding(node, first + 2, "asym" in str(node.target)))


@rule("qcompile.norm_quantize.default", "qcompile.norm_quantize_asym.default")
def norm_quantize(e: Emitter, node: Call) -> tuple[Value, ...]:
    """A norm, a rotation, codes."""
    x, weight, eps, offset = node.args[:4]
    return _finished(e, node, normalized(e, e.value(x), weight, float(eps), float(offset), x), x, 4)


@rule("qcompile.add_norm_quantize.default", "qcompile.add_norm_quantize_asym.default")
def add_norm_quantize(e: Emitter, node: Call) -> tuple[Value, ...]:
    """A sum, its norm, a rotation, codes."""
    x, residual, weight, eps, offset = node.args[:5]
    total = e.op("Add", e.value(x), e.value(residual))
    return (total, *_finished(e, node, normalized(e, total, weight, float(eps), float(offset), x), x, 5))


@rule("qcompile.gated_quantize.default", "qcompile.gated_quantize_asym.default")
def gated_quantize(e: Emitter, node: Call) -> tuple[Value, ...]:
    """A gated activation, a rotation, codes."""
    gate, up, name = node.args[:3]
    made = e.op("Mul", activation(e, str(name), e.value(gate), e.dtype(gate)), e.value(up))
    return _finished(e, node, made, gate, 3)


@rule("qcompile.hadamard_quantize.default", "qcompile.hadamard_quantize_asym.default")
def hadamard_quantize(e: Emitter, node: Call) -> tuple[Value, ...]:
    """A rotation, codes."""
    return _finished(e, node, e.value(node.args[0]), node.args[0], 1)


@rule("qcompile.hadamard.default")
def hadamard(e: Emitter, node: Call) -> Value:
    """A rotation that runs."""
    x, matrix, size = node.args
    return rotated(e, e.value(x), x, matrix, int(size))


@rule("qcompile.quantize_static.default")
def quantize_static(e: Emitter, node: Call) -> Value:
    """Codes by one scale that is a constant."""
    x, scale, zero, bits = node.args[:4]
    element = argument(node, 4, "element", "int")
    dtype = torch.promote_types(e.dtype(x), torch.float32)
    if element == "int" and bits == 8:
        point = e.constant(0, torch.int8) if zero is None else e.op("Squeeze", e.value(zero, torch.int8))
        return e.op("QuantizeLinear", e.value(x, dtype), e.op("Squeeze", e.value(scale, dtype)), point)
    rounding = Rounding(int(bits), -1, str(element))
    return _codes(e, e.value(x, dtype), e.value(scale, dtype), e.optional(zero, dtype), rounding, dtype)


@rule("qcompile.dequantize_activation.default")
def dequantize_activation(e: Emitter, node: Call) -> Value:
    """The numbers that codes stand for."""
    codes, scale, zero, group = node.args[:4]
    return _restored(e, codes, scale, zero, int(group), e.dtype(node))


def _restored(e: Emitter, codes: Any, scale: Any, zero: Any, group_size: int, dtype: torch.dtype) -> Value:
    """`(code - zero) · scale` [..., K]."""
    work = torch.float64 if torch.float64 in (e.dtype(scale), dtype) else torch.float32
    columns, rank = int(e.shape(codes)[-1]), len(e.shape(codes))
    group = columns if group_size == -1 else min(group_size, columns)
    values, factor = e.value(codes, work), e.value(scale, work)
    offset = e.optional(zero, work)
    if int(e.shape(scale)[-1]) > 1:
        values = _grouped(e, values, columns, group, rank)
        factor = e.op("Unsqueeze", factor, e.ints([-1]))
        offset = None if offset is None else e.op("Unsqueeze", offset, e.ints([-1]))
    made = e.op("Mul", values if offset is None else e.op("Sub", values, offset), factor)
    if int(e.shape(scale)[-1]) > 1:
        made = e.slice(e.reshape(made, [*[0] * (rank - 1), -1]), rank - 1, 0, columns)
    return made if dtype == work else e.cast(made, dtype)


@rule("qcompile.integer_linear.default")
def integer_linear(e: Emitter, node: Call) -> Value:
    """Products of codes: in integers where a token and an output row have one scale each, else of the numbers they stand for."""
    codes, scale, zero, w_codes, w_scale, w_zero, bias, group, w_bits, w_group, dtype = node.args[:11]
    scale2 = argument(node, 11, "w_scale2", None)
    columns = int(e.shape(codes)[-1])
    weight = Weight(w_codes, w_scale, w_zero, scale2, int(w_bits), int(w_group), columns)
    if int(e.shape(scale)[-1]) == 1 and weight.groups == 1 and weight.bits == 8 and w_zero is None and scale2 is None:
        made = exact_integers(e, e.value(codes), e.value(scale, torch.float32), e.optional(zero, torch.int32), weight)
    else:
        x = _restored(e, codes, scale, zero, int(group), torch.float32)
        made = multiply(e, x, weight, torch.float32)
    return _rounded(e, made, bias, dtype)


def _rounded(e: Emitter, made: Value, bias: Any, dtype: torch.dtype) -> Value:
    """With the bias, from float32 to the type of the result."""
    made = made if bias is None else e.op("Add", made, e.value(bias, torch.float32))
    return made if dtype == torch.float32 else e.cast(made, dtype)


@rule("qcompile.float8_linear.default")
def float8_linear(e: Emitter, node: Call) -> Value:
    """Products of the numbers that float8 codes stand for."""
    codes, scale, w_codes, w_scale, bias, group, w_group, dtype = node.args[:8]
    columns = int(e.shape(codes)[-1])
    weight = Weight(w_codes, w_scale, None, argument(node, 8, "w_scale2", None), 8, int(w_group), columns, "fp8")
    x = _restored(e, codes, scale, None, int(group), torch.float32)
    return _rounded(e, multiply(e, x, weight, torch.float32), bias, dtype)


@rule("qcompile.integer_conv2d.default")
def integer_conv2d(e: Emitter, node: Call) -> Value:
    """As onnxruntime fuses it: both sides dequantized, by one scale for the input, one for each output channel."""
    codes, scale, zero, w_codes, w_scale, bias, kernel, stride, padding, dilation, groups, w_bits, dtype = node.args
    point = e.constant(0, torch.int8) if zero is None else e.op("Squeeze", e.value(zero, torch.int8))
    x = e.op("DequantizeLinear", e.value(codes), e.op("Squeeze", e.value(scale, torch.float32)), point)
    channels = int(e.shape(codes)[1]) // int(groups)
    columns = channels * kernel[0] * kernel[1]
    weight = Weight(w_codes, w_scale, None, None, int(w_bits), -1, columns)
    matrix = e.reshape(numbers(e, weight, torch.float32), [-1, channels, *kernel])
    options: dict[str, Any] = {"kernel_shape": list(kernel), "strides": list(stride), "dilations": list(dilation), "group": int(groups)}
    made = e.op("Conv", x, matrix, e.optional(bias, torch.float32), pads=[*padding, *padding], **options)
    return made if dtype == torch.float32 else e.cast(made, dtype)
