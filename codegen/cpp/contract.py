"""What a C++ kernel is: one function that every thread of a team calls with its operands as tensors.

`static void NAME(const Team& team, const Tensor& x, …, const Tensor& out)`: operands in the order of the operator's declaration,
those that the specification has. Sizes that the specification fixes are `constexpr`; all others (batch, sequence, pages) are read
from the tensors, as are strides; the last axis of an operand is dense, which the engine checks. A thread writes its share of the outputs
(`team.share`) and never splits a sum, so that results do not depend on how many threads there are; where a kernel has two phases,
`team.wait()` stands between them. A row's result does not depend on the rows beside it either: kernels of all buckets sum in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qcompile.codegen.contract import Declaration, description, kernel_name, stored
from qcompile.codegen.cpp.source import Lines, function, joined
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter

MACHINE = "cpu"
TYPES = {
    "fp32": "float",
    "bf16": "bf16",
    "fp16": "fp16",
    "i64": "int64_t",
    "i32": "int32_t",
    "i8": "int8_t",
    "uint8": "uint8_t",
    "bool": "bool",
}
"""Storage -> C++ type, as `support.h` has it."""


@dataclass(frozen=True, kw_only=True)
class Operator(Declaration):
    """A declaration, and `emit`, which makes the kernel of a specification that is not refused.

    The order of `operands` is the order of the function's parameters, results (`out`, `out1` …) last.
    """

    emit: Callable[[KernelSpec], Kernel]

    def present(self, spec: KernelSpec) -> list[str]:
        """The operands that a specification has, in order."""
        return [name for name in self.operands if spec.format(name) is not None]


def kernel(
    spec: KernelSpec,
    operands: Iterable[str],
    body: Lines,
    helpers: Iterable[Lines] = (),
    layouts: Iterable[tuple[str, str]] = (),
    expects: Iterable[str] = (),
) -> Kernel:
    """Put a kernel together.

    Args:
        spec: what it implements.
        operands: in the order of the parameters.
        body: of the function; it sees `team` and the operands by name.
        helpers: functions that come before; kernels that bring the same one share it.
        layouts: operand -> name of a layout in `qcompile.ir.layouts`, applied once at load.
        expects: instruction classes that the binary must contain.
    """
    names, name = list(operands), kernel_name(spec, MACHINE)
    comment = "\n// ".join(line for line in description(spec, MACHINE) if line)
    whole = function(f"static void {name}", ["const Team& team", *(f"const Tensor& {operand}" for operand in names)], comment, body)
    parameters = tuple(Parameter(operand, "pointer", operand, _pointee(spec, operand)) for operand in names)
    launch = Launch(name, (1, 1, 1), parameters)
    return Kernel(name, spec, joined([*helpers, whole]), (launch,), (), tuple(layouts), tuple(expects), ".cpp")


def _pointee(spec: KernelSpec, operand: str) -> str:
    """The storage of an operand's elements; packed codes are bytes."""
    kind = stored(spec, operand)
    return kind if kind in TYPES else "uint8"


def type_of(spec: KernelSpec, operand: str) -> str:
    """The C++ type of an operand's elements."""
    return TYPES[_pointee(spec, operand)]
