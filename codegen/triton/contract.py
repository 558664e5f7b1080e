"""What an operator needs from a specification: checked in one place, so that an unknown operand or option is refused and never ignored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from qcompile.codegen.triton.source import Lines, module
from qcompile.codegen.triton.tiles import Architecture
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter, Workspace
from qcompile.ir.size import Size

HALVES = ("bf16", "fp16")
FLOATS = ("bf16", "fp16", "fp32")
TRITON_TYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1, "uint8": 1, "i8": 1, "fp8e4nv": 1, "i32": 4, "i64": 8}
FLOAT8 = "fp8e4nv"
FLOAT8_CAPABILITY = 89
"""The first architecture that rounds to and multiplies 8-bit floats."""
LARGEST_INDEX = 1 << 31
"""Offsets inside one tile's matrix are 32-bit integers; a matrix beyond that is refused."""


def allow_all(spec: KernelSpec) -> str | None:
    """Refuse nothing beyond what the operator's declaration says."""
    del spec
    return None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How a specification of one operator must look, and who emits it.

    Attributes:
        emit: makes the kernel of a specification that is not refused.
        operands: operand -> the storages it may have; an empty tuple leaves the judgement to `refuses`.
        optional: operands that may be missing.
        sizes: names of the sizes it needs.
        options: names of the options it understands.
        required: options without a default.
        buckets: the buckets it has kernels for.
        refuses: what else is wrong with a specification, or None.
    """

    emit: Callable[[KernelSpec, Architecture], Kernel]
    operands: Mapping[str, tuple[str, ...]]
    sizes: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ("",)
    refuses: Callable[[KernelSpec], str | None] = field(default=allow_all)

    def objection(self, spec: KernelSpec) -> str | None:
        """Why `spec` cannot be served, or None."""
        return self._shape_objection(spec) or self._operand_objection(spec) or self.refuses(spec)

    def _shape_objection(self, spec: KernelSpec) -> str | None:
        if spec.bucket not in self.buckets:
            return f"bucket {spec.bucket!r}: expected one of {', '.join(map(repr, self.buckets))}"
        sizes = dict(spec.sizes)
        for name in self.sizes:
            if sizes.get(name, 0) < 1:
                return f"size {name}={sizes.get(name)}: expected a positive number"
        options = dict(spec.options)
        for name in options:
            if name not in self.options:
                return f"option {name!r}: expected one of {', '.join(self.options) or 'none'}"
        missing = [name for name in self.required if name not in options]
        return f"option {missing[0]!r} is missing" if missing else None

    def _operand_objection(self, spec: KernelSpec) -> str | None:
        formats = dict(spec.formats)
        for name in formats:
            if name not in self.operands:
                return f"operand {name!r}: expected one of {', '.join(self.operands)}"
        for name, allowed in self.operands.items():
            if name not in formats:
                if name not in self.optional:
                    return f"operand {name!r} is missing"
            elif allowed and formats[name] not in allowed:
                return f"{name} is {formats[name]}: expected {' or '.join(allowed)}"
        return None


def lacks_float8(spec: KernelSpec, arch: Architecture) -> str | None:
    """An objection if codes are 8-bit floats and the architecture has no instructions for them; scales are read as bytes."""
    if arch.capability >= FLOAT8_CAPABILITY or not any(kind == FLOAT8 and name != "scale" for name, kind in spec.formats):
        return None
    return f"8-bit floats: expected sm{FLOAT8_CAPABILITY} or later, {arch.name} has no instructions for them"


def same_storage(spec: KernelSpec, *operands: str) -> str | None:
    """An objection if the operands (those that are there) are not stored in one type."""
    found = {name: spec.format(name) for name in operands if spec.format(name) is not None}
    if len(set(found.values())) > 1:
        return f"mixed storage ({', '.join(f'{name} {kind}' for name, kind in found.items())}): expected one type"
    return None


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


def stored(spec: KernelSpec, operand: str) -> str:
    """The storage of an operand that is there."""
    kind = spec.format(operand)
    assert kind is not None
    return kind


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
    sizes = ", ".join(f"{name}={value}" for name, value in spec.sizes)
    title = f"{spec.operator}{f'[{spec.bucket}]' if spec.bucket else ''} for {arch.name}: {sizes or 'any size'}."
    docstring = [
        title,
        "",
        *(f"{name}: {kind}" for name, kind in spec.formats),
        *(f"option {name} = {value!r}" for name, value in spec.options),
    ]
    digest = hashlib.sha256(repr((spec, arch.name)).encode()).hexdigest()[:10]
    place = f"_{spec.bucket.replace('-', '_')}" if spec.bucket else ""
    name = f"{spec.operator.rstrip('_')}{place}_{digest}"
    return Kernel(name, spec, module(docstring, functions), tuple(launches), tuple(workspaces), tuple(layouts), tuple(expects))
