"""What Triton 3.6's interpreter needs to be right.

bfloat16 and float8 are computed on their raw bits there, casts to float8 lose the carry of a rounding, and loops over tensors fail
with numpy 2.4. bfloat16 stays stored as uint16, float8 (e4m3) as uint8; arithmetic goes through float32 and rounds to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = NDArray[Any]


def widen(bits: Array) -> Array:
    """uint16 patterns of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: Array) -> Array:
    """float32 as uint16 patterns of bfloat16, to nearest even; NaN stays NaN."""
    bits = numbers.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), rounded).astype(np.uint16)


def widen_float8(bits: Array) -> Array:
    """uint8 patterns of float8 (e4m3) as float32."""
    return np.asarray(torch.from_numpy(np.array(bits, dtype=np.uint8)).view(torch.float8_e4m3fn).float().numpy())


def narrow_float8(numbers: Array) -> Array:
    """float32 as uint8 patterns of float8 (e4m3), to nearest even and saturating, as the GPU's conversion is; NaN stays NaN."""
    bounded = torch.from_numpy(np.array(numbers, dtype=np.float32)).clamp(-448, 448)
    return np.asarray(bounded.to(torch.float8_e4m3fn).view(torch.uint8).numpy())


def is_float8(handle: TensorHandle) -> bool:
    """Whether a handle's numbers are stored as patterns of 8 bits."""
    return bool(handle.dtype.scalar == tl.float8e4nv)


def is_bfloat16(handle: TensorHandle) -> bool:
    """Whether a handle's numbers are stored as patterns."""
    return bool(handle.dtype.scalar == tl.bfloat16)


def numbers(handle: TensorHandle) -> Array:
    """A handle's data as numpy can compute with it."""
    if is_float8(handle):
        return widen_float8(handle.data)
    return widen(handle.data) if is_bfloat16(handle) else handle.data


def cast(self: InterpreterBuilder, source: TensorHandle, kind: Any) -> TensorHandle:
    """Any numeric cast."""
    del self
    target = kind.scalar
    with np.errstate(all="ignore"):
        if target == tl.float8e4nv:
            return TensorHandle(source.data if is_float8(source) else narrow_float8(numbers(source)), target)
        if target == tl.bfloat16:
            return TensorHandle(source.data if is_bfloat16(source) else narrow(numbers(source).astype(np.float32)), target)
        return TensorHandle(numbers(source).astype(interpreter._get_np_dtype(target)), target)


def binary(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, operation: Callable[..., Array]) -> TensorHandle:
    """Any operation on two tensors; a comparison gives booleans."""
    del self
    kind = left.dtype.scalar
    with np.errstate(all="ignore"):
        result = operation(numbers(left), numbers(right))
    if kind == tl.bfloat16 and result.dtype != np.bool_:
        return TensorHandle(narrow(result), kind)
    fits = interpreter._validate_np_data_size(result, kind)
    return TensorHandle(result if fits else result.astype(interpreter._get_np_dtype(kind)), kind)


def unary(self: InterpreterBuilder, argument: TensorHandle, operation: Callable[..., Array]) -> TensorHandle:
    """Any function of one tensor."""
    del self
    with np.errstate(all="ignore"):
        result = operation(numbers(argument))
    return TensorHandle(narrow(result) if is_bfloat16(argument) else result, argument.dtype.scalar)


def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
    """A matrix product, accumulated in the type of `d`."""
    del self
    return TensorHandle(np.matmul(numbers(a), numbers(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    """A bfloat16 literal."""
    del self
    return TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


def install() -> None:
    """Patch the interpreter of this process."""
    patches = {"cast_impl": cast, "binary_op": binary, "unary_op": unary, "create_dot": dot, "get_bf16": constant}
    for name, replacement in patches.items():
        setattr(InterpreterBuilder, name, replacement)
    InterpreterBuilder.create_fp_to_fp = lambda self, source, kind, _: self.cast_impl(source, kind)
    original = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
