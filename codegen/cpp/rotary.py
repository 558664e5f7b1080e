"""Rotary positions: the table of a step, and its application to queries and keys."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import EVERY_VECTOR, every_row, row_pointer, vectors
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
                row_pointer(spec, "out", "cosines"),
                row_pointer(spec, "out1", "sines"),
                *block(
                    "for (int64_t place = 0; place < frequencies; place++)",
                    [
                        "const float angle = static_cast<float>(position) * frequency[place];",
                        f"const float cosine = std::cos(angle){scale}, sine = std::sin(angle){scale};",
                        "put(cosines + place, cosine);",
                        "put(cosines + place + frequencies, cosine);",
                        "put(sines + place, sine);",
                        "put(sines + place + frequencies, sine);",
                    ],
                ),
            ]
        ),
    ]
    return kernel(spec, ROTARY_TABLE.present(spec), body)


def emit_rope(spec: KernelSpec) -> Kernel:
    """`x · cos + (-x_high, x_low) · sin` of x [B, H, S, R]; a thread takes heads of tokens."""
    kinds = {operand: type_of(spec, operand) for operand in ROPE.operands}
    body = [
        *constants({"heads": (spec.size("H"), "of a token"), "half": (spec.size("R") // 2, "of a head's numbers")}),
        "const int64_t tokens = x.size[2], tables = cos.size[0];",
        *every_row(
            [
                "const int64_t token = row / heads % tokens, head = row % heads, batch = row / heads / tokens;",
                f"const {kinds['x']}* from = x.at<{kinds['x']}>(batch, head, token);",
                f"const {kinds['cos']}* cosines = cos.at<{kinds['cos']}>(tables > 1 ? batch : 0, token);",
                f"const {kinds['sin']}* sines = sin.at<{kinds['sin']}>(tables > 1 ? batch : 0, token);",
                f"{kinds['out']}* to = out.at<{kinds['out']}>(batch, head, token);",
                *vectors(
                    [
                        "const int64_t high = column + half;",
                        "const Floats first = load(from + column, count), second = load(from + high, count);",
                        "const Floats low = first * load(cosines + column, count) - second * load(sines + column, count);",
                        "store(to + high, second * load(cosines + high, count) + first * load(sines + high, count), count);",
                        "store(to + column, low, count);",
                    ],
                    last="half",
                ),
            ],
            "x.size[0] * heads * tokens",
        ),
    ]
    return kernel(spec, ROPE.present(spec), body, [EVERY_VECTOR])


def refuses_rope(spec: KernelSpec) -> str | None:
    """Heads that have no halves."""
    return f"R={spec.size('R')}: expected an even number" if spec.size("R") % 2 else None


ROTARY_TABLE = Operator(
    emit=emit_table, operands={"positions": ("i64",), "inv_freq": ("fp32",), "out": FLOATS, "out1": FLOATS}, sizes=("F",),
    options=("scaling",), required=("scaling",),
)  # fmt: skip
ROPE = Operator(emit=emit_rope, operands={"x": FLOATS, "cos": FLOATS, "sin": FLOATS, "out": FLOATS}, sizes=("H", "R"), refuses=refuses_rope)
