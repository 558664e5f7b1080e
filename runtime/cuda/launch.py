"""One kernel launch with its arguments frozen: packed once, checked once against what the binary was compiled for, launched in one call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping

import torch

from qcompile.errors import ArtifactError, EngineError
from qcompile.ir.lowered import Launch, Parameter
from qcompile.ir.size import Size, evaluate
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.operands import Operand, is_dense

WARP = 32
HIDDEN_POINTERS = 2
"""Triton 3.6 ends every parameter list with its global and its profiling scratch; our kernels use neither, so both are null."""

END, BUFFER_POINTER, BUFFER_SIZE = 0, 1, 2
"""`CU_LAUNCH_PARAM_*`: how the `extra` argument of `cuLaunchKernel` names what follows."""

GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
I32 = range(-(2**31), 2**31)

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "i1": torch.bool,
}
"""Triton's name of an element type -> torch's."""


def parameter_offsets(parameters: Iterable[Parameter]) -> tuple[tuple[int, ...], int]:
    """Byte offsets of the parameters under natural alignment, and the size of the buffer with the hidden pointers at its end."""
    offsets, end = [], 0
    for parameter in parameters:
        width = 8 if parameter.kind == "pointer" else 4
        end = _align(end, width)
        offsets.append(end)
        end += width
    return tuple(offsets), _align(end, 8) + 8 * HIDDEN_POINTERS


def _align(offset: int, width: int) -> int:
    return -(-offset // width) * width


def stride_axes(launch: Launch, operand: str, rank: int) -> frozenset[int]:
    """The axes of an operand of that rank whose strides are parameters of the launch (`stride:x:-2`).

    `broadcast:x:0` is 0 where the axis has one element and the stride elsewhere; it covers nothing, the operand stays contiguous.
    """
    names = [name for parameter in launch.parameters for name in _names(parameter.value)]
    axes = [int(name.split(":")[2]) for name in names if name.startswith(f"stride:{operand}:")]
    return frozenset(axis % rank for axis in axes) if rank else frozenset()


def _names(size: Size) -> list[str]:
    if isinstance(size, tuple):
        return [name for item in size[1:] for name in _names(item)]
    return [size] if isinstance(size, str) else []


class FrozenLaunch:
    """A launch whose grid and arguments are settled; calling it costs one call into the driver."""

    def __init__(
        self,
        driver: Driver,
        function: int,
        kernel: str,
        launch: Launch,
        operands: Mapping[str, Operand],
        sizes: Mapping[str, int],
        stream: int,
    ) -> None:
        """Check every assumption, pack the arguments, and prepare the call.

        Raises:
            EngineError: naming the kernel, the parameter, what it was compiled for, and what it would have got.
        """
        self.kernel, self.launch = kernel, launch
        self._driver = driver
        self._offsets, size = parameter_offsets(launch.parameters)
        self._buffer = ctypes.create_string_buffer(size)
        self._size = ctypes.c_size_t(size)
        self._extra = (ctypes.c_void_p * 5)(
            BUFFER_POINTER, ctypes.addressof(self._buffer), BUFFER_SIZE, ctypes.addressof(self._size), END
        )  # fmt: skip
        self._grid = (ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint())
        block = (ctypes.c_uint(WARP * launch.num_warps), ctypes.c_uint(1), ctypes.c_uint(1))
        self._arguments = (
            ctypes.c_void_p(function), *self._grid, *block, ctypes.c_uint(launch.shared_bytes), ctypes.c_void_p(stream), None, self._extra
        )  # fmt: skip
        self.patch(operands, sizes)

    def patch(self, operands: Mapping[str, Operand], sizes: Mapping[str, int]) -> None:
        """Put other operands and sizes into the prepared call; checked like the first ones, and nothing changes if a check fails."""
        values = [self._value(parameter, operands, sizes) for parameter in self.launch.parameters]
        grid = self._checked_grid(sizes)
        for place, value in zip(self._grid, grid, strict=True):
            place.value = value
        for parameter, offset, value in zip(self.launch.parameters, self._offsets, values, strict=True):
            struct.pack_into("<Q" if parameter.kind == "pointer" else "<i", self._buffer, offset, value)
        self._owners = [operand.owner for operand in operands.values()]

    def __call__(self) -> None:
        """Put the launch on its stream."""
        self._driver.launch(self._arguments, f"kernel {self.kernel}")

    @property
    def packed(self) -> bytes:
        """The parameter buffer as the driver reads it."""
        return self._buffer.raw

    def _fail(self, place: str, expected: str, got: str) -> EngineError:
        return EngineError(
            f"kernel {self.kernel}: {place}: expected {expected}, got {got}; it was compiled for that, compile the model again"
        )

    def _value(self, parameter: Parameter, operands: Mapping[str, Operand], sizes: Mapping[str, int]) -> int:
        place = f"parameter {parameter.name}"
        if parameter.kind == "pointer":
            return self._address(parameter, place, operands)
        value = self._evaluate(parameter.value, place, operands, sizes)
        if parameter.kind != "i32":
            raise self._fail(place, "a pointer or an i32", parameter.kind)
        if value not in I32:
            raise self._fail(place, "a 32-bit integer", str(value))
        if value % parameter.divisible_by:
            raise self._fail(place, f"a multiple of {parameter.divisible_by}", str(value))
        return value

    def _address(self, parameter: Parameter, place: str, operands: Mapping[str, Operand]) -> int:
        name = str(parameter.value)
        if name not in operands:
            raise self._fail(place, f"one of the operands {', '.join(operands)}", repr(name))
        operand = operands[name]
        if operand.dtype is not None and DTYPES.get(parameter.dtype) != operand.dtype:
            raise self._fail(place, f"elements of {parameter.dtype}", str(operand.dtype).removeprefix("torch."))
        if operand.address == 0:
            raise self._fail(place, "memory", "a null pointer")
        if operand.address % parameter.divisible_by:
            raise self._fail(place, f"an address that is a multiple of {parameter.divisible_by} bytes", hex(operand.address))
        if not is_dense(operand.shape, operand.strides, stride_axes(self.launch, name, len(operand.shape))):
            raise self._fail(place, "contiguous memory where no stride is passed", f"shape {operand.shape} with strides {operand.strides}")
        return operand.address

    def _evaluate(self, size: Size, place: str, operands: Mapping[str, Operand], sizes: Mapping[str, int]) -> int:
        strides = {name: self._stride(name, place, operands) for name in _names(size) if name.startswith(("stride:", "broadcast:"))}
        try:
            return evaluate(size, {**sizes, **strides})
        except ArtifactError as error:
            raise EngineError(f"kernel {self.kernel}: {place}: {error}") from None

    def _stride(self, name: str, place: str, operands: Mapping[str, Operand]) -> int:
        kind, operand, axis = name.split(":")
        if operand not in operands:
            raise self._fail(place, f"a stride of one of {', '.join(operands)}", repr(name))
        shape, strides = operands[operand].shape, operands[operand].strides
        if not -len(strides) <= int(axis) < len(strides):
            raise self._fail(place, f"an axis of {operand}, which has {len(strides)}", axis)
        return 0 if kind == "broadcast" and shape[int(axis)] == 1 else strides[int(axis)]

    def _checked_grid(self, sizes: Mapping[str, int]) -> list[int]:
        grid = [self._evaluate(size, f"grid axis {axis}", {}, sizes) for axis, size in zip("xyz", self.launch.grid, strict=True)]
        for axis, value, limit in zip("xyz", grid, GRID_LIMITS, strict=True):
            if not 1 <= value <= limit:
                raise self._fail(f"grid axis {axis}", f"1 to {limit} programs", str(value))
        return grid
