"""What a Triton kernel is made of beside its body: parameters, strides, and the file around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qcompile.codegen.contract import FLOATS as FLOATS
from qcompile.codegen.contract import HALVES as HALVES
from qcompile.codegen.contract import Declaration as Declaration
from qcompile.codegen.contract import description, kernel_name
from qcompile.codegen.contract import same_storage as same_storage
from qcompile.codegen.contract import stored as stored
from qcompile.codegen.triton.source import Lines, module
from qcompile.codegen.triton.tiles import Architecture
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter, Workspace
from qcompile.ir.size import Size

TRITON_TYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1, "uint8": 1, "i8": 1, "fp8e4nv": 1, "i32": 4, "i64": 8}
FLOAT8 = "fp8e4nv"
FLOAT8_CAPABILITY = 89
"""The first architecture that rounds to and multiplies 8-bit floats."""
LARGEST_INDEX = 1 << 31
"""Offsets inside one tile's matrix are 32-bit integers; a matrix beyond that is refused."""


@dataclass(frozen=True, kw_only=True)
class Operator(Declaration):
    """A declaration, and `emit`, which makes the kernel of a specification that is not refused."""

    emit: Callable[[KernelSpec, Architecture], Kernel]


def lacks_float8(spec: KernelSpec, arch: Architecture) -> str | None:
    """An objection if codes are 8-bit floats and the architecture has no instructions for them; scales are read as bytes."""
    if arch.capability >= FLOAT8_CAPABILITY or not any(kind == FLOAT8 and name != "scale" for name, kind in spec.formats):
        return None
    return f"8-bit floats: expected sm{FLOAT8_CAPABILITY} or later, {arch.name} has no instructions for them"


def divisor(count: int, dtype: str) -> int:
    """What may be assumed of an address that is a multiple of `count` elements: 16 bytes or nothing."""
    return 16 if count * ELEMENT_BYTES[dtype] % 16 == 0 else 1


def pointer(name: str, dtype: str, divisible_by: int = 16, value: str | None = None) -> Parameter:
    """A pointer to an operand, a result or a workspace, called as it is."""
    return Parameter(name, "pointer", value or name, "u8" if dtype == "uint8" else dtype, divisible_by)


def integer(name: str, value: Size | None = None, divisible_by: int = 1) -> Parameter:
    """A 32-bit integer known at the launch; by default the size of its own name."""
    return Parameter(name, "i32", name if value is None else value, "i32", divisible_by)


def strides(operand: str, dimensions: Iterable[int], prefix: str, divisible_by: int = 1) -> list[Parameter]:
    """Run-time strides in elements: the value of `x_stride_0` is `stride:x:0`, which the engine looks up."""
    return [integer(f"{prefix}_stride_{place}", f"stride:{operand}:{place}", divisible_by) for place in dimensions]


def kernel(
    spec: KernelSpec,
    arch: Architecture,
    functions: Iterable[Lines],
    launches: Iterable[Launch],
    workspaces: Iterable[Workspace] = (),
    layouts: Iterable[tuple[str, str]] = (),
    expects: Iterable[str] = (),
) -> Kernel:
    """Put a kernel together: the file's docstring says what it implements, the name is unique for specification and target."""
    name, docstring = kernel_name(spec, arch.name), description(spec, arch.name)
    return Kernel(name, spec, module(docstring, functions), tuple(launches), tuple(workspaces), tuple(layouts), tuple(expects))
