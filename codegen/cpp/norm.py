"""Normalizations over the last axis: threads share the rows."""

from __future__ import annotations

from qcompile.codegen.cpp.contract import Operator, kernel
from qcompile.codegen.cpp.source import Lines, block, constants, number, when
from qcompile.ir.lowered import Kernel, KernelSpec

LANES_LOOP = "for (int64_t column = 0; column < columns; column += LANES)"
COUNT = "const int64_t count = std::min<int64_t>(LANES, columns - column);"


def every_row(lines: Lines, rows: str = "out.rows()") -> Lines:
    """The lines for each row of this thread's share; `row` is its number."""
    return [
        f"const Range mine = team.share({rows});",
        *block("for (int64_t row = mine.first; row < mine.last; row++)", lines),
    ]


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
    value = f"{_load('from')} + {_load('other')}" if summed else _load("from")
    names = (ADD_RMS_NORM if summed else RMS_NORM).present(spec)
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        *when(spec.format("weight"), ["const float* gain = weight.at<float>();"]),
        *every_row(
            [
                "const float* from = x.row<float>(row);",
                *when(summed, ["const float* other = residual.row<float>(row);", "float* total = out.row<float>(row);"]),
                f"float* to = {result}.row<float>(row);",
                "Floats squares{};",
                *block(
                    LANES_LOOP,
                    [COUNT, f"const Floats value = {value};", *when(summed, ["store(total + column, value, count);"]),
                     "squares = fma(value, value, squares);"],
                ),
                f"const Floats factor = splat(1.0f / std::sqrt(sum(squares) / columns + {number(spec.option('eps'))}));",
                *block(
                    LANES_LOOP,
                    [COUNT, f"const Floats value = {_load('total' if summed else 'from')} * factor;",
                     f"store(to + column, {_normed(spec, 'value')}, count);"],
                ),
            ]
        ),
    ]  # fmt: skip
    return kernel(spec, names, body)


def emit_layer_norm(spec: KernelSpec) -> Kernel:
    """`(x - mean) / sqrt(variance + eps) · weight + bias`: the variance is summed from what is left without the mean."""
    value = f"({_load('from')} - mean) * factor"
    value = f"{value} * {_load('gain')}" if spec.format("weight") else value
    value = f"{value} + {_load('shift')}" if spec.format("bias") else value
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        *when(spec.format("weight"), ["const float* gain = weight.at<float>();"]),
        *when(spec.format("bias"), ["const float* shift = bias.at<float>();"]),
        *every_row(
            [
                "const float* from = x.row<float>(row);",
                "float* to = out.row<float>(row);",
                "const Floats mean = splat(sum(from, columns) / columns);",
                "float squares = 0.0f;",
                *block(
                    LANES_LOOP,
                    [
                        COUNT,
                        f"const Floats rest = {_load('from')} - mean;",
                        "float lanes[LANES];",
                        "store(lanes, rest * rest);",
                        "squares += sum(load(lanes, count));",
                    ],
                ),
                f"const Floats factor = splat(1.0f / std::sqrt(squares / columns + {number(spec.option('eps'))}));",
                *block(LANES_LOOP, [COUNT, f"store(to + column, {value}, count);"]),
            ]
        ),
    ]
    return kernel(spec, LAYER_NORM.present(spec), body)


_FLOAT = ("fp32",)
_NORM = {"x": _FLOAT, "weight": _FLOAT, "out": _FLOAT}

RMS_NORM = Operator(
    emit=emit_norm, operands=_NORM, optional=frozenset({"weight"}), sizes=("K",), options=("eps", "offset"), required=("eps",)
)
ADD_RMS_NORM = Operator(
    emit=emit_norm,
    operands={"x": _FLOAT, "residual": _FLOAT, "weight": _FLOAT, "out": _FLOAT, "out1": _FLOAT},
    optional=frozenset({"weight"}),
    sizes=("K",),
    options=("eps", "offset"),
    required=("eps",),
)
LAYER_NORM = Operator(
    emit=emit_layer_norm,
    operands={"x": _FLOAT, "weight": _FLOAT, "bias": _FLOAT, "out": _FLOAT},
    optional=frozenset({"weight", "bias"}),
    sizes=("K",),
    options=("eps",),
    required=("eps",),
)
