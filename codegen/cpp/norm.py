"""Normalizations over the last axis: threads share the rows."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import EVERY_VECTOR, every_row, pointer, row_pointer, vectors
from qcompile.codegen.cpp.source import constants, number, when
from qcompile.ir.lowered import Kernel, KernelSpec


def _load(name: str) -> str:
    """A vector of an operand's row, zeros behind its end."""
    return f"load({name} + column, count)"


def _normed(spec: KernelSpec, value: str) -> str:
    """The value of a vector that is to be stored."""
    offset = float(spec.option("offset", 0.0))
    gain = _load("gain") if not offset else f"({_load('gain')} + splat({number(offset)}))"
    return f"{value} * {gain}" if spec.format("weight") else value


def emit_norm(spec: KernelSpec) -> Kernel:
    """Root-mean-square normalization, with or without a residual sum that is stored as well."""
    summed = spec.operator == "add_rms_norm"
    result = "out1" if summed else "out"
    value = f"as_stored<{type_of(spec, 'out')}>({_load('from')} + {_load('other')})" if summed else _load("from")
    names = (ADD_RMS_NORM if summed else RMS_NORM).present(spec)
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        *pointer(spec, "weight", "gain"),
        *every_row(
            [
                row_pointer(spec, "x", "from"),
                *([row_pointer(spec, "residual", "other"), row_pointer(spec, "out", "total")] if summed else []),
                row_pointer(spec, result, "to"),
                "Floats squares{};",
                *vectors(
                    [
                        f"const Floats value = {value};",
                        *when(summed, ["store(total + column, value, count);"]),
                        "squares = fma(value, value, squares);",
                    ]
                ),
                f"const Floats factor = splat(1.0f / std::sqrt(sum(squares) / columns + {number(spec.option('eps'))}));",
                *vectors(
                    [
                        f"const Floats value = {_load('total' if summed else 'from')} * factor;",
                        f"store(to + column, {_normed(spec, 'value')}, count);",
                    ]
                ),
            ]
        ),
    ]
    return kernel(spec, names, body, [EVERY_VECTOR])


def emit_layer_norm(spec: KernelSpec) -> Kernel:
    """`(x - mean) / sqrt(variance + eps) · weight + bias`: the variance is summed from what is left without the mean."""
    value = f"({_load('from')} - mean) * factor"
    value = f"{value} * {_load('gain')}" if spec.format("weight") else value
    value = f"{value} + {_load('shift')}" if spec.format("bias") else value
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        *pointer(spec, "weight", "gain"),
        *pointer(spec, "bias", "shift"),
        *every_row(
            [
                row_pointer(spec, "x", "from"),
                row_pointer(spec, "out", "to"),
                "const Floats mean = splat(sum(from, columns) / columns);",
                "float squares = 0.0f;",
                *vectors(
                    [
                        f"const Floats rest = {_load('from')} - mean;",
                        "float lanes[LANES];",
                        "store(lanes, rest * rest);",
                        "squares += sum(load(lanes, count));",
                    ]
                ),
                f"const Floats factor = splat(1.0f / std::sqrt(squares / columns + {number(spec.option('eps'))}));",
                *vectors([f"store(to + column, {value}, count);"]),
            ]
        ),
    ]
    return kernel(spec, LAYER_NORM.present(spec), body, [EVERY_VECTOR])


_NORM = {"x": FLOATS, "weight": FLOATS, "out": FLOATS}

RMS_NORM = Operator(
    emit=emit_norm, operands=_NORM, optional=frozenset({"weight"}), sizes=("K",), options=("eps", "offset"), required=("eps",)
)
ADD_RMS_NORM = Operator(
    emit=emit_norm,
    operands={"x": FLOATS, "residual": FLOATS, "weight": FLOATS, "out": FLOATS, "out1": FLOATS},
    optional=frozenset({"weight"}),
    sizes=("K",),
    options=("eps", "offset"),
    required=("eps",),
)
LAYER_NORM = Operator(
    emit=emit_layer_norm,
    operands={"x": FLOATS, "weight": FLOATS, "bias": FLOATS, "out": FLOATS},
    optional=frozenset({"weight", "bias"}),
    sizes=("K",),
    options=("eps",),
    required=("eps",),
)
