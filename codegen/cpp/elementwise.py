"""What computes each number by itself: activations, gated ones, sums."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS
from qcompile.codegen.cpp.contract import Operator, kernel
from qcompile.codegen.cpp.loops import EVERY_VECTOR, every_row, row_pointer, vectors
from qcompile.codegen.cpp.source import Lines, constants, function
from qcompile.ir.lowered import Kernel, KernelSpec

BODIES: dict[str, Lines] = {
    "relu": ["return choose(x < Floats{}, Floats{}, x);"],
    "silu": ["return x / (splat(1.0f) + exp(-x));"],
    "gelu": ["return x * 0.5f * (splat(1.0f) + erf(x * 0.70710678f));"],
    "gelu_tanh": [
        "const Floats inside = 0.79788456f * (x + 0.044715f * x * x * x);",
        "return x * 0.5f * (splat(1.0f) + tanh(inside));",
    ],
}
"""Activation -> what its function does with `x`."""


def activation_function(name: str) -> Lines:
    """The activation of a vector."""
    return function(f"static inline Floats {name}", ["Floats x"], f"The activation {name}.", BODIES[name])


def _rows(spec: KernelSpec, columns: int, operands: list[str], value: str) -> Lines:
    """`out` = a value of vectors of the operands, which are called as their rows: `x_row`."""
    pointers = [row_pointer(spec, name, f"{name}_row") for name in operands]
    lanes = [f"const Floats {name}_lanes = load({name}_row + column, count);" for name in operands]
    return [
        *constants({"columns": (columns, "of a row")}),
        *every_row(
            [
                *pointers,
                row_pointer(spec, "out", "to"),
                *vectors([*lanes, f"store(to + column, {value}, count);"]),
            ]
        ),
    ]


def emit_gated(spec: KernelSpec) -> Kernel:
    """`activation(gate) · up`."""
    name = spec.option("activation")
    body = _rows(spec, spec.size("I"), ["gate", "up"], f"{name}(gate_lanes) * up_lanes")
    return kernel(spec, GATED_ACTIVATION.present(spec), body, [EVERY_VECTOR, activation_function(name)])


def emit_activation(spec: KernelSpec) -> Kernel:
    """`activation(x)`."""
    name = spec.option("activation")
    body = _rows(spec, spec.size("K"), ["x"], f"{name}(x_lanes)")
    return kernel(spec, ACTIVATION.present(spec), body, [EVERY_VECTOR, activation_function(name)])


def emit_add(spec: KernelSpec) -> Kernel:
    """`x + y`."""
    return kernel(spec, ADD.present(spec), _rows(spec, spec.size("K"), ["x", "y"], "x_lanes + y_lanes"), [EVERY_VECTOR])


def refuses_activation(spec: KernelSpec) -> str | None:
    """Activations that have no function."""
    name = spec.option("activation")
    return None if name in BODIES else f"activation {name!r}: expected one of {', '.join(BODIES)}"


GATED_ACTIVATION = Operator(
    emit=emit_gated, operands={"gate": FLOATS, "up": FLOATS, "out": FLOATS}, sizes=("I",), options=("activation",),
    required=("activation",), refuses=refuses_activation,
)  # fmt: skip
ACTIVATION = Operator(
    emit=emit_activation, operands={"x": FLOATS, "out": FLOATS}, sizes=("K",), options=("activation",), required=("activation",),
    refuses=refuses_activation,
)  # fmt: skip
ADD = Operator(emit=emit_add, operands={"x": FLOATS, "y": FLOATS, "out": FLOATS}, sizes=("K",))
