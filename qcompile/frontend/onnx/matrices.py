"""Quantized weights as ONNX files hold them, recognised: which of them have a format here, and why others do not.

A weight is [N, K], one output row a row; files hold it so, or as its transpose, or as filters [N, C, ...] of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from onnx import TensorProto
from torch import Tensor

from qcompile.frontend.onnx.parts import CODES, SCALES, Constants, Matrix, UnfitError, plain_name, unsigned
from qcompile.frontend.onnx.program import Step
from qcompile.frontend.onnx.weights import Weight
from qcompile.quant.element import ELEMENTS
from qcompile.quant.format import QuantFormat
from qcompile.quant.granularity import Granularity
from qcompile.quant.packing import unpack


def dequantized(constants: Constants, step: Step, *, transposed: bool) -> Matrix:
    """The weight that a `DequantizeLinear` makes; `transposed` where it makes [K, N].

    Raises:
        UnfitError: for types, axes or blocks that have no format here.
    """
    codes_name, scale_name, zero_name = (*step.inputs, "")[:3]
    weight = constants.weights.get(codes_name)
    if weight is None or weight.kind not in CODES:
        raise UnfitError("its codes are computed, or no integers of 2, 4 or 8 bits")
    if not all(constants.known(name) for name in (scale_name, zero_name) if name):
        raise UnfitError("its scale or zero point is computed")
    if step.attributes.get("output_dtype", TensorProto.FLOAT) not in SCALES.values():
        raise UnfitError("it is dequantized to another type than a float of 32 bits or less")
    bits, signed = CODES[weight.kind]
    rows, columns = _sizes(weight, transposed)
    arrange, group = _arrangement(constants, step, weight, (rows, columns), transposed)
    if zero_name and constants.shape(zero_name) != constants.shape(scale_name):
        raise UnfitError(f"its zero points have the shape {list(constants.shape(zero_name))}, which is not that of its scale")
    scale = _scales(constants, scale_name, arrange)
    zero = None if not zero_name else partial(_zero_points, constants, zero_name, arrange, bits, signed)
    if zero is None and not signed:
        zero = partial(_nought, rows, -(-columns // (columns if group == -1 else group)))
    form = QuantFormat(ELEMENTS[f"int{bits}"], Granularity(group), _in_the_middle(zero, bits), constants.dtype(scale_name))
    return Matrix(plain_name(codes_name), rows, columns, form, partial(_codes, weight, bits, signed, rows, transposed), scale, zero)


def _sizes(weight: Weight, transposed: bool) -> tuple[int, int]:
    if transposed and len(weight.shape) != 2:
        raise UnfitError(f"it has {len(weight.shape)} dimensions")
    if len(weight.shape) < 2 or not weight.numel:
        raise UnfitError(f"its shape is {list(weight.shape)}")
    rows = weight.shape[1] if transposed else weight.shape[0]
    return rows, weight.numel // rows


def _arrangement(
    constants: Constants, step: Step, weight: Weight, sizes: tuple[int, int], transposed: bool
) -> tuple[Callable[[Tensor], Tensor], int]:
    """What makes [N, G] of a scale as it is stored, and the group size."""
    rows, columns = sizes
    dims, shape = len(weight.shape), constants.shape(step.inputs[1])
    axis, block = int(step.attributes.get("axis", 1)) % dims, int(step.attributes.get("block_size", 0))
    along_rows = axis == (1 if transposed else 0)
    if not block:
        if len(shape) > 1 or (shape and shape[0] != 1 and not (along_rows and shape[0] == rows)):
            raise UnfitError(f"its scale has the shape {list(shape)} along axis {axis}, which is not that of output rows")
        return lambda part: part.reshape(-1, 1).expand(rows, 1).contiguous(), -1
    if along_rows or dims != 2 or block < 2:
        raise UnfitError(f"its blocks of {block} along axis {axis} are not runs of two or more input columns")
    groups = -(-columns // block)
    if shape != ((groups, rows) if transposed else (rows, groups)):
        raise UnfitError(f"its scale has the shape {list(shape)} for {rows} rows of {groups} blocks")
    return lambda part: (part.t() if transposed else part).contiguous(), block if groups > 1 else -1


def _scales(constants: Constants, name: str, arrange: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    if constants.dtype(name) not in SCALES:
        raise UnfitError(f"its scale is {str(constants.dtype(name)).removeprefix('torch.')}")
    return lambda: arrange(constants.load(name))


def _zero_points(constants: Constants, name: str, arrange: Callable[[Tensor], Tensor], bits: int, signed: bool) -> Tensor:
    return arrange(unsigned(constants.load(name), bits, signed))


def _in_the_middle(zero: Callable[[], Tensor] | None, bits: int) -> bool:
    """Whether zero points are what a format without any has."""
    return zero is None or bool((zero() == 1 << (bits - 1)).all())


def _nought(rows: int, groups: int) -> Tensor:
    return torch.zeros(rows, groups, dtype=torch.uint8)


def _codes(weight: Weight, bits: int, signed: bool, rows: int, transposed: bool) -> Tensor:
    codes = unsigned(weight.load(), bits, signed)
    return (codes.t() if transposed else codes.reshape(rows, -1)).contiguous()


def multiplied_bits(constants: Constants, step: Step) -> Matrix:
    """The weight of a com.microsoft `MatMulNBits`, whose blocks of codes lie as they do here.

    Raises:
        UnfitError: for another order of columns, zero points between the levels, or other bits.
    """
    _, codes_name, scale_name, zero_name, order, _ = (*step.inputs, "", "", "")[:6]
    rows, columns, block = (int(step.attributes.get(name, 0)) for name in ("N", "K", "block_size"))
    bits, weight = int(step.attributes.get("bits", 4)), constants.weights.get(codes_name)
    if weight is None or bits not in (2, 4, 8) or order:
        raise UnfitError("its codes are computed or in another order, or not of 2, 4 or 8 bits")
    if min(rows, columns, block) < 1 or weight.numel * 8 != rows * -(-columns // block) * block * bits:
        raise UnfitError(f"its codes have the shape {list(weight.shape)} for {rows} rows of {columns} columns in blocks of {block}")
    if zero_name and not (constants.known(zero_name) and constants.dtype(zero_name) == torch.uint8):
        raise UnfitError("its zero points lie between the levels")
    if not constants.known(scale_name):
        raise UnfitError("its scale is computed")
    groups = -(-columns // block)
    if torch.Size(constants.shape(scale_name)).numel() != rows * groups:
        raise UnfitError(f"its scale has the shape {list(constants.shape(scale_name))} for {rows} rows of {groups} blocks")
    source = "" if zero_name else _per_row(constants, scale_name, rows)
    width = 1 if source else groups
    scale = _scales(constants, source or scale_name, lambda part: part.reshape(rows, width).contiguous())
    zero = None if not zero_name else partial(_packed_zero_points, constants, zero_name, rows, groups, bits)
    granularity = Granularity(-1 if width == 1 or groups == 1 else block)
    form = QuantFormat(ELEMENTS[f"int{bits}"], granularity, _in_the_middle(zero, bits), constants.dtype(source or scale_name))
    return Matrix(plain_name(codes_name), rows, columns, form, partial(_unpacked, weight, rows, bits, columns), scale, zero)


def _per_row(constants: Constants, name: str, rows: int) -> str:
    """The scale of each row that is repeated for its blocks, if it is one."""
    step = constants.makers.get(name)
    if step is None or step.domain or step.operator != "Expand":
        return ""
    return step.inputs[0] if constants.shape(step.inputs[0]) == (rows, 1) else ""


def _unpacked(weight: Weight, rows: int, bits: int, columns: int) -> Tensor:
    return unpack(weight.load().reshape(rows, -1), bits, columns)[:, :columns].contiguous()


def _packed_zero_points(constants: Constants, name: str, rows: int, groups: int, bits: int) -> Tensor:
    return unpack(constants.load(name).reshape(rows, -1), bits, groups)


def integer_product(constants: Constants, weight_name: str, zero_name: str, scale_name: str) -> Matrix:
    """The weight [K, N] of a `MatMulInteger` whose result is multiplied by a scale of the weight, of the columns or of the whole.

    Raises:
        UnfitError: for codes that are computed, or shapes that are none of a matrix.
    """
    weight = constants.weights.get(weight_name)
    if weight is None or weight.kind not in CODES or len(weight.shape) != 2:
        raise UnfitError("its codes are computed, or no matrix")
    bits, signed = CODES[weight.kind]
    columns, rows = weight.shape
    for name in filter(None, (zero_name, scale_name)):
        count = torch.Size(constants.shape(name)).numel()
        if count not in (1, rows) or constants.shape(name)[-1:] not in ((count,), ()):
            raise UnfitError(f"{name} has the shape {list(constants.shape(name))}, expected one number or {rows}")

    def arrange(part: Tensor) -> Tensor:
        return part.reshape(-1, 1).expand(rows, 1).contiguous()

    scale = _scales(constants, scale_name, arrange)
    zero = partial(_zero_points, constants, zero_name, arrange, bits, signed) if zero_name else None
    if zero is None and not signed:
        zero = partial(_nought, rows, 1)
    form = QuantFormat(ELEMENTS[f"int{bits}"], Granularity(-1), _in_the_middle(zero, bits), constants.dtype(scale_name))
    return Matrix(plain_name(weight_name), rows, columns, form, partial(_codes, weight, bits, signed, rows, True), scale, zero)
