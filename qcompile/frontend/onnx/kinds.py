"""ONNX's element types, and the torch dtypes that hold them here."""

from __future__ import annotations

import torch
from onnx import TensorProto

KINDS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32, TensorProto.INT8: torch.int8, TensorProto.INT16: torch.int16, TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64, TensorProto.UINT8: torch.uint8, TensorProto.UINT16: torch.uint16, TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64, TensorProto.BOOL: torch.bool, TensorProto.INT4: torch.int8, TensorProto.UINT4: torch.uint8,
    TensorProto.INT2: torch.int8, TensorProto.UINT2: torch.uint8, TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2, TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz, TensorProto.FLOAT4E2M1: torch.float32,
}  # fmt: skip
"""Element type -> dtype. Half precision is traced in float32, as everywhere; elements of 2 and 4 bits stand in a byte each."""

STORED: dict[int, torch.dtype] = KINDS | {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
"""Element type -> dtype as it lies in the file, 2- and 4-bit elements unpacked."""

BITS: dict[int, int] = {
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2, TensorProto.FLOAT4E2M1: 4,
}  # fmt: skip
"""Bits of an element that is smaller than a byte."""

RANGES: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127), TensorProto.UINT8: (0, 255), TensorProto.INT4: (-8, 7), TensorProto.UINT4: (0, 15),
    TensorProto.INT16: (-(1 << 15), (1 << 15) - 1), TensorProto.UINT16: (0, (1 << 16) - 1), TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3), TensorProto.INT32: (-(1 << 31), (1 << 31) - 1),
}  # fmt: skip
"""Smallest and largest value of an integer type that values are quantized to."""

LARGEST: dict[int, float] = {
    TensorProto.FLOAT8E4M3FN: 448.0, TensorProto.FLOAT8E5M2: 57344.0, TensorProto.FLOAT8E4M3FNUZ: 240.0,
    TensorProto.FLOAT8E5M2FNUZ: 57344.0,
}  # fmt: skip
"""Largest value of an 8-bit float."""

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Dtypes that torch stores and hardly computes in."""

_OF_DTYPE: dict[torch.dtype, int] = {dtype: kind for kind, dtype in reversed(KINDS.items())}


def kind_of(dtype: torch.dtype) -> int:
    """The element type that a tensor of `dtype` has if nothing else is known of it."""
    return _OF_DTYPE[dtype]


def kind_name(kind: int) -> str:
    """Such as `FLOAT16`."""
    known = kind in TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(kind)) if known else f"element type {kind}"
