"""What an operator needs from a specification: checked in one place, so that an unknown operand or option is refused and never ignored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qcompile.ir.lowered import KernelSpec

HALVES = ("bf16", "fp16")
FLOATS = ("bf16", "fp16", "fp32")


def allow_all(spec: KernelSpec) -> str | None:
    """Refuse nothing beyond what the operator's declaration says."""
    del spec
    return None


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """How a specification of one operator must look; each backend's `Operator` adds who emits it.

    Attributes:
        operands: operand -> the storages it may have; an empty tuple leaves the judgement to `refuses`.
        optional: operands that may be missing.
        sizes: names of the sizes it needs.
        options: names of the options it understands.
        required: options without a default.
        buckets: the buckets it has kernels for.
        refuses: what else is wrong with a specification, or None.
    """

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


def same_storage(spec: KernelSpec, *operands: str) -> str | None:
    """An objection if the operands (those that are there) are not stored in one type."""
    found = {name: spec.format(name) for name in operands if spec.format(name) is not None}
    if len(set(found.values())) > 1:
        return f"mixed storage ({', '.join(f'{name} {kind}' for name, kind in found.items())}): expected one type"
    return None


def stored(spec: KernelSpec, operand: str) -> str:
    """The storage of an operand that is there."""
    kind = spec.format(operand)
    assert kind is not None
    return kind


def kernel_name(spec: KernelSpec, machine: str) -> str:
    """A name that no other specification has on the same machine, fit for a file and a function."""
    digest = hashlib.sha256(repr((spec, machine)).encode()).hexdigest()[:10]
    place = f"_{spec.bucket.replace('-', '_')}" if spec.bucket else ""
    return f"{spec.operator.rstrip('_')}{place}_{digest}"


def description(spec: KernelSpec, machine: str) -> list[str]:
    """What a kernel implements, in lines: the head of its file."""
    sizes = ", ".join(f"{name}={value}" for name, value in spec.sizes)
    return [
        f"{spec.operator}{f'[{spec.bucket}]' if spec.bucket else ''} for {machine}: {sizes or 'any size'}.",
        "",
        *(f"{name}: {kind}" for name, kind in spec.formats),
        *(f"option {name} = {value!r}" for name, value in spec.options),
    ]
