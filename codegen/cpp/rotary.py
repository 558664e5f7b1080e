"""Rotary positions: the table of a step, and its application to queries and keys."""

from __future__ import annotations

from qcompile.codegen.cpp.contract import Operator, kernel
from qcompile.codegen.cpp.norm import every_row
from qcompile.codegen.cpp.source import block, constants, number
from qcompile.ir.lowered import Kernel, KernelSpec


def emit_table(spec: KernelSpec) -> Kernel:
    """Cosines and sines of positions times frequencies, each twice side by side."""
    scaling = float(spec.option("scaling"))
    scale = "" if scaling == 1.0 else f" * {number(scaling)}"
    body = [
        *constants({"frequencies": (spec.size("F"), "half of a row")}),
        "const float* frequency = inv_freq.at<float>();",
        *every_row(
            [
                "const int64_t position = positions.element<int64_t>(row);",
                "float *cosines = out.row<float>(row), *sines = out1.row<float>(row);",
                *block(
                    "for (int64_t place = 0; place < frequencies; place++)",
                    [
                        "const float angle = static_cast<float>(position) * frequency[place];",
                        f"cosines[place] = cosines[place + frequencies] = std::cos(angle){scale};",
                        f"sines[place] = sines[place + frequencies] = std::sin(angle){scale};",
                    ],
                ),
            ]
        ),
    ]
    return kernel(spec, ROTARY_TABLE.present(spec), body)


def emit_rope(spec: KernelSpec) -> Kernel:
    """`x · cos + (-x_high, x_low) · sin` of x [B, H, S, R]; a thread takes heads of tokens."""
    body = [
        *constants({"heads": (spec.size("H"), "of a token"), "half": (spec.size("R") // 2, "of a head's numbers")}),
        "const int64_t tokens = x.size[2], tables = cos.size[0];",
        *every_row(
            [
                "const int64_t token = row / heads % tokens, head = row % heads, batch = row / heads / tokens;",
                "const float* from = x.at<float>(batch, head, token);",
                "const float* cosines = cos.at<float>(tables > 1 ? batch : 0, token);",
                "const float* sines = sin.at<float>(tables > 1 ? batch : 0, token);",
                "float* to = out.at<float>(batch, head, token);",
                *block(
                    "for (int64_t low = 0; low < half; low++)",
                    [
                        "const int64_t high = low + half;",
                        "const float first = from[low], second = from[high];",
                        "to[low] = first * cosines[low] - second * sines[low];",
                        "to[high] = second * cosines[high] + first * sines[high];",
                    ],
                ),
            ],
            "x.size[0] * heads * tokens",
        ),
    ]
    return kernel(spec, ROPE.present(spec), body)


def refuses_rope(spec: KernelSpec) -> str | None:
    """Heads that have no halves."""
    return f"R={spec.size('R')}: expected an even number" if spec.size("R") % 2 else None


_FLOAT = ("fp32",)
ROTARY_TABLE = Operator(
    emit=emit_table, operands={"positions": ("i64",), "inv_freq": _FLOAT, "out": _FLOAT, "out1": _FLOAT}, sizes=("F",),
    options=("scaling",), required=("scaling",),
)  # fmt: skip
ROPE = Operator(emit=emit_rope, operands={"x": _FLOAT, "cos": _FLOAT, "sin": _FLOAT, "out": _FLOAT}, sizes=("H", "R"), refuses=refuses_rope)
