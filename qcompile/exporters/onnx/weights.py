"""Packed weights: how ONNX stores them, what they stand for, and products with them.

Integers of 4 and 8 bits are stored as such, [K, N] for products, and `DequantizeLinear` makes numbers of them, which onnxruntime fuses
into its own product. Any other element stays as it is packed, [N, bytes], and is taken apart by standard operators, which
onnxruntime does once, as it loads. Scales keep their stored type, so that a file is as small as the artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.exporters.onnx.described import describe
from qcompile.exporters.onnx.emitter import MICROSOFT, Emitter, Value
from qcompile.quant.described import BLOCKS, COLUMNS, LOOKUP, PACKED, ROWS
from qcompile.quant.element import element_of
from qcompile.quant.packing import pack, packed_bytes, unpack

_STANDARD = (4, 8)
"""Bits of the integers that ONNX has types for."""
_BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits takes."""
_NBITS = (4, 8)
FLOAT8_VALUES = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0).tolist())
"""What each byte stands for; the two that are no number occur in no weight."""


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] as the graph stores it; nodes are `get_attr`s. See `qcompile.quant.reference.dequantize`."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    scale2: fx.Node | None
    bits: int
    group_size: int
    columns: int
    element: str = "int"

    @property
    def rows(self) -> int:
        """N."""
        return int(self.codes.meta["val"].shape[0])

    @property
    def groups(self) -> int:
        """G."""
        return int(self.scale.meta["val"].shape[1])

    @property
    def group(self) -> int:
        """Columns of a full group."""
        return self.columns if self.group_size == -1 else min(self.group_size, self.columns)

    @property
    def minimum(self) -> bool:
        """Whether `zero` holds the values of code 0, floats [N, G]: no operator of ONNX takes any, so standard ones add them."""
        return self.zero is not None and bool(self.zero.meta["val"].is_floating_point())

    @property
    def is_standard(self) -> bool:
        """Whether ONNX has a type for its codes, and `DequantizeLinear` makes its numbers of them."""
        return self.element == "int" and self.bits in _STANDARD and not self.minimum


def multiply(e: Emitter, x: Value, weight: Weight, dtype: torch.dtype) -> Value:
    """X [..., K], of type `dtype`, times the transposed weight: [..., N]."""
    block = _block(weight)
    if e.is_ort and block and weight.element == "int" and weight.bits in _NBITS and not weight.minimum:
        return _matmul_nbits(e, x, weight, dtype, block)
    if weight.is_standard:
        return e.op("MatMul", x, _standard(e, weight, dtype, transposed=True))
    return e.op("MatMul", x, e.swap_last(numbers(e, weight, dtype), 2))


def numbers(e: Emitter, weight: Weight, dtype: torch.dtype) -> Value:
    """The weight [N, K] as `dtype`."""
    if weight.is_standard:
        return _standard(e, weight, dtype, transposed=False)
    codes = _float8(e, weight) if weight.element == "fp8" else e.value(weight.codes)
    values = e.cast(codes, torch.float32) if weight.element == "fp8" else _decoded(e, codes, weight, torch.float32)
    made = _scaled(e, values, _zeros(e, weight, None), _scale(e, weight), weight)
    describe(e, made, weight, ROWS if weight.element == "fp8" else PACKED, _parts(e, weight, codes, e.optional(weight.zero)))
    return made if dtype == torch.float32 else e.cast(made, dtype)


def rows_of(e: Emitter, indices: Value, weight: Weight, dtype: torch.dtype) -> Value:
    """Rows `indices` of the weight: [..., K]."""
    taken = e.op("Gather", e.value(weight.codes), indices, axis=0)
    values = _decoded(e, taken, weight, torch.float32)
    scale = e.op("Gather", _scale(e, weight), indices, axis=0)
    made = _scaled(e, values, _zeros(e, weight, indices), scale, weight)
    describe(e, made, weight, LOOKUP, _parts(e, weight, e.value(weight.codes), e.optional(weight.zero)))
    return made if dtype == torch.float32 else e.cast(made, dtype)


def exact_integers(e: Emitter, codes: Value, scale: Value, zero: Value | None, weight: Weight) -> Value:
    """`scale · w_scale · Σ (code - zero) · w_code` [..., N] of int8 codes [..., K] and 8-bit weights, the sum in int32."""
    matrix = _stored_codes(e, weight, transposed=True)
    total = e.op("MatMulInteger", codes, matrix)
    describe(e, total, weight, COLUMNS, _parts(e, weight, matrix, None))
    if zero is not None:

        def column_sums(packed: Tensor) -> Tensor:
            return (packed.to(torch.int32) - 128).sum(1, keepdim=True).t().to(torch.int32)

        sums = e.from_constant(weight.codes, "sums", torch.int32, (1, weight.rows), column_sums)
        total = e.op("Sub", total, e.op("Mul", zero, sums))
    # One factor after the other: onnxruntime takes the product of both for the scale of a whole tensor, and drops all but one of them.
    return e.op("Mul", e.op("Mul", e.cast(total, torch.float32), scale), e.reshape(_scale(e, weight), [1, -1]))


# Stored as ONNX has types for it


def _signed(weight: Weight) -> bool:
    return weight.zero is None


def _stored_codes(e: Emitter, weight: Weight, *, transposed: bool) -> Value:
    """Codes [K, N] or [N, K]: signed where there is no zero point."""
    name, form = str(weight.codes.target), "columns" if transposed else "rows"
    key = ("codes", name, form)
    if key not in e.shared:
        shape = (weight.columns, weight.rows) if transposed else (weight.rows, weight.columns)
        source = e.graph.constants[name]
        make = partial(_arranged, source, weight.bits, weight.columns, _signed(weight), transposed)
        kinds = (ir.DataType.INT4, ir.DataType.UINT4) if weight.bits == 4 else (ir.DataType.INT8, ir.DataType.UINT8)
        kind = kinds[0] if _signed(weight) else kinds[1]
        if weight.bits == 4:
            e.shared[key] = e.packed(f"{name}.{form}", kind, shape, make)
        else:
            dtype = torch.int8 if _signed(weight) else torch.uint8
            e.shared[key] = e.initializer(f"{name}.{form}", dtype, shape, make)
    found: Value = e.shared[key]
    return found


def _arranged(source: Any, bits: int, columns: int, signed: bool, transposed: bool) -> Tensor:
    """Codes in the order of the file, in bytes; with a sign they are two's complement."""
    codes = unpack(source.materialize(), bits, columns)
    if signed:
        codes = codes ^ (1 << (bits - 1))
    codes = (codes.t() if transposed else codes).contiguous()
    if bits == 4:
        return pack(codes.reshape(1, -1), 4).reshape(-1)
    return codes.view(torch.int8) if signed else codes


def _standard(e: Emitter, weight: Weight, dtype: torch.dtype, *, transposed: bool) -> Value:
    """The weight [K, N] or [N, K] by `DequantizeLinear`, computed in float32."""
    key = ("numbers", str(weight.codes.target), transposed, dtype)
    if key in e.shared:
        known: Value = e.shared[key]
        return known
    codes = _stored_codes(e, weight, transposed=transposed)
    scale = _scale(e, weight)
    zero = None if weight.zero is None else _stored_zero(e, weight, transposed=transposed)
    if weight.groups == 1:
        options: dict[str, Any] = {"axis": 1 if transposed else 0}
        scale = e.reshape(scale, [-1])
    else:
        options = {"axis": 0 if transposed else 1, "block_size": weight.group}
        scale = e.swap_last(scale, 2) if transposed else scale
    made = e.op("DequantizeLinear", codes, scale, zero, **options)
    describe(e, made, weight, COLUMNS if transposed else ROWS, _parts(e, weight, codes, zero))
    e.shared[key] = made if dtype == torch.float32 else e.cast(made, dtype)
    found: Value = e.shared[key]
    return found


def _stored_zero(e: Emitter, weight: Weight, *, transposed: bool) -> Value:
    """Zero points [G, N] or [N, G], unsigned; [N] of one group, because not every runtime reshapes 4 bits."""
    assert weight.zero is not None
    name, form = str(weight.zero.target), "columns" if transposed else "rows"
    shape: tuple[int, ...] = (weight.groups, weight.rows) if transposed else (weight.rows, weight.groups)
    shape = (weight.rows,) if weight.groups == 1 else shape
    make = partial(_arranged, e.graph.constants[name], weight.bits, weight.groups, False, transposed)
    if weight.bits == 4:
        return e.packed(f"{name}.{form}", ir.DataType.UINT4, shape, make)
    return e.initializer(f"{name}.{form}", torch.uint8, shape, lambda: make().view(shape))


# Scales


def _scale(e: Emitter, weight: Weight) -> Value:
    """Effective scales float32 [N, G] of stored ones (`qcompile.quant.scales`)."""
    key = ("scale", str(weight.scale.target))
    if key not in e.shared:
        e.shared[key] = _effective(e, weight)
    found: Value = e.shared[key]
    return found


def _parts(e: Emitter, weight: Weight, codes: Value, zero: Value | None) -> dict[str, Value | None]:
    """Initializers by what they are; scales of the scales too."""
    return {"codes": codes, "scale": _stored_scale(e, weight), "zero": zero, "scale2": e.optional(weight.scale2)}


def _stored_scale(e: Emitter, weight: Weight) -> Value:
    """Scales [N, G] in their own type; a power of two as its exponent, int8."""
    if e.dtype(weight.scale) != torch.float8_e8m0fnu:
        return e.value(weight.scale)

    def exponents(scale: Tensor) -> Tensor:
        return torch.frexp(scale.to(torch.float32))[1].sub(1).to(torch.int8)

    return e.from_constant(weight.scale, "exponents", torch.int8, e.shape(weight.scale), exponents)


def _effective(e: Emitter, weight: Weight) -> Value:
    if e.dtype(weight.scale) == torch.float8_e8m0fnu:
        scale = e.op("Pow", e.constant(2.0, torch.float32), e.cast(_stored_scale(e, weight), torch.float32))
    else:
        scale = e.value(weight.scale, torch.float32)
    if weight.scale2 is None:
        return scale
    second = e.value(weight.scale2, torch.float32)
    runs = int(e.shape(weight.scale2)[1])
    if runs > 1:
        size = -(-weight.groups // runs)
        second = e.op("Gather", second, e.ints([group // size for group in range(weight.groups)]), axis=1)
    return e.op("Mul", scale, second)


def _zeros(e: Emitter, weight: Weight, indices: Value | None) -> Value | None:
    """Zero points or minima float32 [N, G], or of the rows `indices` [..., G]; None where there are none."""
    if weight.zero is None:
        return None
    stored = e.value(weight.zero)
    taken = stored if indices is None else e.op("Gather", stored, indices, axis=0)
    return e.cast(taken, torch.float32) if weight.minimum else _unpacked(e, taken, weight.bits, weight.groups, torch.float32)


def _scaled(e: Emitter, values: Value, zero: Value | None, scale: Value, weight: Weight) -> Value:
    """`(value - zero) · scale` of values [..., K] whose groups have zero points and scales [..., G]; `value · scale + zero` with minima."""
    if weight.groups > 1:
        places = e.ints([column // weight.group for column in range(weight.columns)])
        zero = None if zero is None else e.op("Gather", zero, places, axis=-1)
        scale = e.op("Gather", scale, places, axis=-1)
    if weight.minimum:
        return e.op("Add", e.op("Mul", values, scale), zero)
    return e.op("Mul", values if zero is None else e.op("Sub", values, zero), scale)


# Taken apart


def _float8(e: Emitter, weight: Weight) -> Value:
    """Codes [N, K], stored as float8."""
    shape = (weight.rows, weight.columns)
    return e.from_constant(weight.codes, "float8", torch.float8_e4m3fn, shape, lambda codes: codes.view(torch.float8_e4m3fn))


def _decoded(e: Emitter, packed: Value, weight: Weight, dtype: torch.dtype) -> Value:
    """What packed codes [..., bytes] stand for, before zero points and scales: [..., K]."""
    element = element_of(weight.element, weight.bits)
    values = FLOAT8_VALUES if weight.element == "fp8" else element.values
    if values is not None:
        codes = _unpacked(e, packed, weight.bits, weight.columns, torch.int64)
        return e.op("Gather", e.constant(list(values), dtype), codes, axis=0)
    codes = _unpacked(e, packed, weight.bits, weight.columns, dtype)
    return codes if weight.zero is not None else e.op("Sub", codes, e.constant(float(1 << (weight.bits - 1)), dtype))


def _unpacked(e: Emitter, packed: Value, bits: int, count: int, dtype: torch.dtype) -> Value:
    """Codes [..., count] of streams of bits [..., bytes] as `dtype`."""
    if bits == 8:
        return e.cast(packed, dtype)
    per_word, word_bytes = (8 // bits, 1) if 8 % bits == 0 else (8, bits)
    kind = torch.uint8 if word_bytes == 1 else torch.uint64
    words = e.op("Unsqueeze", packed, e.ints([-1])) if word_bytes == 1 else _words(e, packed, bits, count, word_bytes)
    shifts = e.unsigned([place * bits for place in range(per_word)], kind)
    parts = e.op("BitwiseAnd", e.op("BitShift", words, shifts, direction="RIGHT"), e.unsigned([(1 << bits) - 1], kind))
    flat = e.op("Concat", e.op("Shape", packed, start=0, end=-1), e.ints([-1]), axis=0)
    codes = e.op("Reshape", e.cast(parts, dtype), flat)
    return e.op("Slice", codes, e.ints([0]), e.ints([count]), e.ints([-1]))


def _words(e: Emitter, packed: Value, bits: int, count: int, word_bytes: int) -> Value:
    """Bytes put together to numbers that hold whole codes: [..., words, 1]."""
    missing = -packed_bytes(count, bits) % word_bytes
    wide = e.op("Cast", packed, to=ir.DataType.UINT64.value)
    if missing:
        tail = e.op("Concat", e.op("Shape", packed, start=0, end=-1), e.ints([missing]), axis=0)
        wide = e.op("Concat", wide, e.op("Expand", e.unsigned([0], torch.uint64), tail), axis=-1)
    grouped = e.op("Concat", e.op("Shape", packed, start=0, end=-1), e.ints([-1, word_bytes]), axis=0)
    placed = e.op(
        "BitShift", e.op("Reshape", wide, grouped), e.unsigned([8 * place for place in range(word_bytes)], torch.uint64), direction="LEFT"
    )
    # No bit lies in two bytes: their sum puts them together.
    parts = e.ops("Split", placed, count=word_bytes, axis=-1, num_outputs=word_bytes)
    total = parts[0]
    for part in parts[1:]:
        total = e.op("BitwiseOr", total, part)
    return total


# onnxruntime's own product


def _block(weight: Weight) -> int:
    """The block size that MatMulNBits can take: the group, or for one scale a row the largest that divides it; 0 for none."""
    if weight.groups > 1:
        return weight.group if weight.group in _BLOCKS else 0
    return next((block for block in _BLOCKS if weight.columns % block == 0), 0)


def _block_zeros(e: Emitter, weight: Weight, blocks: int) -> Value:
    """Zero points of each block, packed; that of a row is repeated."""
    assert weight.zero is not None
    if weight.groups == blocks:
        return e.value(weight.zero)

    def repeated(zero: Tensor) -> Tensor:
        return pack(unpack(zero, weight.bits, 1).expand(-1, blocks).contiguous(), weight.bits)

    return e.from_constant(weight.zero, "blocks", torch.uint8, (weight.rows, packed_bytes(blocks, weight.bits)), repeated)


def _matmul_nbits(e: Emitter, x: Value, weight: Weight, dtype: torch.dtype, block: int) -> Value:
    blocks = -(-weight.columns // block)
    width = block * weight.bits // 8

    def arranged(packed: Tensor) -> Tensor:
        return torch.nn.functional.pad(packed, (0, blocks * width - packed.shape[1])).view(len(packed), blocks, width)

    codes = e.from_constant(weight.codes, "blocks", torch.uint8, (weight.rows, blocks, width), arranged)
    scale = _scale(e, weight)
    if weight.groups != blocks:
        scale = e.op("Expand", scale, e.ints([weight.rows, blocks]))
    scale = scale if dtype == torch.float32 else e.cast(scale, dtype)
    zero = None if weight.zero is None else _block_zeros(e, weight, blocks)
    options = {"K": weight.columns, "N": weight.rows, "bits": weight.bits, "block_size": block, "accuracy_level": e.accuracy_level}
    made = e.op("MatMulNBits", x, codes, scale, zero, domain=MICROSOFT, **options)
    return describe(e, made, weight, BLOCKS, _parts(e, weight, codes, zero))
