"""Elementwise operators: sums, activations, and gated activations over halves of one matrix."""

from __future__ import annotations

from qcompile.codegen.triton.contract import HALVES, TRITON_TYPES, Operator, integer, kernel, pointer, same_storage, stored
from qcompile.codegen.triton.source import Lines, constants, function
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "silu": ("activated = {x} / (1.0 + tl.exp(-{x}))",),
    "relu": ("activated = tl.maximum({x}, 0.0)",),
    "gelu": ("activated = 0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))",),
    # tanh(y) = 1 - 2 / (exp(2y) + 1): no library call, and an exponent that overflows gives 1.
    "gelu_tanh": (
        "inner = 0.7978845608028654 * ({x} + 0.044715 * {x} * {x} * {x})",
        "activated = {x} * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))",
    ),
}


def activation_lines(name: str, x: str) -> Lines:
    """Lines that leave `activated` for the float32 variable `x`."""
    return [line.format(x=x) for line in ACTIVATIONS[name]]


def refuses_activation(spec: KernelSpec) -> str | None:
    """Activations that are not known, and mixed types."""
    name = spec.option("activation")
    if name not in ACTIVATIONS:
        return f"activation {name!r}: expected one of {', '.join(ACTIVATIONS)}"
    return same_storage(spec, "x", "gate", "up", "out")


def emit_elementwise(spec: KernelSpec, arch: Architecture) -> Kernel:
    """`add` and `activation` over contiguous tensors, whose shape does not matter."""
    kind = TRITON_TYPES[stored(spec, "out")]
    operands = [name for name in ("x", "y") if spec.format(name)]
    result = "left + right" if spec.operator == "add" else "activated"
    names = dict(zip(operands, ("left", "right"), strict=False))
    body = [
        *constants({"K": (spec.size("K"), "columns"), "BLOCK": (1024, "numbers of a program")}),
        "at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "inside = at < rows.to(tl.int64) * K",
        *(f"{name} = tl.load({operand} + at, mask=inside, other=0.0).to(tl.float32)" for operand, name in names.items()),
        *(activation_lines(str(spec.option("activation")), "left") if spec.operator == "activation" else []),
        f"tl.store(out + at, ({result}).to({kind}), mask=inside)",
    ]
    parameters = (*(pointer(name, stored(spec, name)) for name in (*operands, "out")), integer("rows"))
    grid = (("ceildiv", ("mul", "rows", spec.size("K")), 1024), 1, 1)
    doc = "One program computes BLOCK numbers in float32."
    return kernel(spec, arch, [function(spec.operator, [p.name for p in parameters], doc, body)], [Launch(spec.operator, grid, parameters)])


def emit_gated(spec: KernelSpec, arch: Architecture) -> Kernel:
    """`activation(gate) · up`, both with a run-time row stride: they may be halves of one matrix."""
    size = spec.size("I")
    block = min(1024, power_of_two(size))
    body = [
        *constants({"I": (size, "columns"), "BLOCK": (block, "columns of a program")}),
        "row = tl.program_id(0).to(tl.int64)",
        "column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "inside = column < I",
        "left = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)",
        "right = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)",
        *activation_lines(str(spec.option("activation")), "left"),
        f"tl.store(out + row * I + column, (activated * right).to({TRITON_TYPES[stored(spec, 'out')]}), mask=inside)",
    ]
    # A half begins I numbers into its row: only an I that keeps 16-byte alignment may promise it.
    aligned = 16 if size % 16 == 0 else 1
    parameters = (
        pointer("gate", stored(spec, "gate"), aligned),
        pointer("up", stored(spec, "up"), aligned),
        pointer("out", stored(spec, "out")),
        integer("gate_stride", "stride:gate:-2", aligned),
        integer("up_stride", "stride:up:-2", aligned),
    )
    launch = Launch(spec.operator, ("rows", -(-size // block), 1), parameters)
    doc = "One program computes BLOCK columns of one row in float32."
    return kernel(spec, arch, [function(spec.operator, [p.name for p in parameters], doc, body)], [launch])


ADD = Operator(
    emit=emit_elementwise,
    operands={"x": HALVES, "y": HALVES, "out": HALVES},
    sizes=("K",),
    refuses=lambda spec: same_storage(spec, "x", "y", "out"),
)
ACTIVATION = Operator(
    emit=emit_elementwise,
    operands={"x": HALVES, "out": HALVES},
    sizes=("K",),
    options=("activation",),
    required=("activation",),
    refuses=refuses_activation,
)
GATED_ACTIVATION = Operator(
    emit=emit_gated,
    operands={"gate": HALVES, "up": HALVES, "out": HALVES},
    sizes=("I",),
    options=("activation",),
    required=("activation",),
    refuses=refuses_activation,
)
