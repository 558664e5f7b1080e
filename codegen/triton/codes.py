"""Operands of products of codes with codes: how activations and weights are stored there, and the lines that read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd

from qcompile.codegen.triton.contract import FLOAT8, pointer, stored
from qcompile.codegen.triton.loads import WHOLE, Part, format_constants
from qcompile.codegen.triton.source import Lines, load
from qcompile.codegen.triton.weight_format import WeightFormat, parse_format
from qcompile.ir.layouts import HALF
from qcompile.ir.lowered import KernelSpec, Parameter

LEAST_STEP = 32
"""Columns that one 8-bit matrix instruction takes: a group is a multiple of them."""
LARGEST_SUM = 1 << 31
CODE_WIDTHS = (4, 8)
NIBBLE = 16
"""A 4-bit number at the top of a byte is this much too large: no shift brings its sign down, the weight's scale does."""
LOW = Part("low", "(items << 4).to(tl.int8, bitcast=True)", "", 1, 0)
HIGH = Part("high", "(items & 240).to(tl.int8, bitcast=True)", "", 1, HALF)


@dataclass(frozen=True)
class Codes:
    """Both operands of a product.

    Attributes:
        weight: the stored weight; 8 bits stand for float8 where `float8` is set.
        float8: whether both hold 8-bit floats.
        group: columns of an activation that share a scale; all of them or more means one scale per row.
        static: whether one scale serves every row of the activation.
        zero: whether the activation has zero points.
    """

    weight: WeightFormat
    float8: bool
    group: int
    static: bool
    zero: bool

    @property
    def columns(self) -> int:
        """K."""
        return self.weight.columns

    @property
    def x_grouped(self) -> bool:
        """Whether a row of the activation has more than one scale."""
        return self.group < self.columns

    @property
    def grouped(self) -> bool:
        """Whether products are scaled before they are all added."""
        return self.x_grouped or self.weight.grouped

    @property
    def factor(self) -> int:
        """How much too large the numbers of a weight are."""
        return NIBBLE if self.weight.bits == 4 else 1

    def together(self, most: int) -> int:
        """Consecutive columns that always share all scales: a power of two, at most `most`."""
        sizes = [size for size, several in ((self.group, self.x_grouped), (self.weight.group, self.weight.grouped)) if several]
        return gcd(most, *sizes)

    @property
    def kind(self) -> str:
        """Triton's type of the sums."""
        return "tl.float32" if self.float8 else "tl.int32"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The columns that a load of items gives at a time."""
        return (LOW, HIGH) if self.weight.bits == 4 else (WHOLE,)


def weight_text(spec: KernelSpec) -> str:
    """The format of the weight; float8 reads like the int8 of the same groups."""
    text = str(spec.format("w_codes"))
    return re.sub(r"^fp8 ", "int8 ", text) if spec.operator == "float8_linear" else text


def codes_of(spec: KernelSpec) -> Codes:
    """The operands of a specification that is not refused."""
    weight = parse_format(weight_text(spec), spec.size("K"), CODE_WIDTHS)
    assert isinstance(weight, WeightFormat)
    group = int(spec.option("group_size", -1))
    whole = group == -1 or group >= spec.size("K")
    float8 = spec.operator == "float8_linear"
    return Codes(weight, float8, spec.size("K") if whole else group, bool(spec.option("static", False)), spec.format("zero") is not None)


def refuses_codes(spec: KernelSpec) -> str | None:
    """Why the operands of a product of codes cannot be read, or None."""
    text = str(spec.format("w_codes"))
    if text.startswith("fp8 ") != (spec.operator == "float8_linear"):
        return f"w_codes are {text!r}: expected {'8-bit floats, fp8' if spec.operator == 'float8_linear' else 'integers, int4 or int8'}"
    weight = parse_format(weight_text(spec), spec.size("K"), CODE_WIDTHS)
    if isinstance(weight, str):
        return weight.replace("codes are", "w_codes are", 1)
    if spec.format("w_scale") != weight.scale_dtype:
        return f"w_scale is {spec.format('w_scale')}: expected {weight.scale_dtype} as the codes' format says"
    if (spec.format("w_zero") is None) != weight.symmetric:
        return f"w_zero is {spec.format('w_zero')}: expected {'none for symmetric' if weight.symmetric else 'uint8 for asymmetric'} codes"
    return refuses_sums(codes_of(spec))


def refuses_sums(codes: Codes) -> str | None:
    """Groups that cut a matrix instruction's columns, and sums that 32 bits may not hold."""
    for name, size, several in (("weights", codes.weight.group, codes.weight.grouped), ("activations", codes.group, codes.x_grouped)):
        if several and size % LEAST_STEP:
            return f"groups of {size} {name}: expected a multiple of {LEAST_STEP}, which one matrix instruction takes"
    if codes.static and codes.x_grouped:
        return f"one scale for groups of {codes.group} activations: expected one scale a group"
    if codes.weight.bits == 4 and codes.columns % 2:
        return f"K={codes.columns}: expected an even number of columns for 4-bit weights"
    bits = codes.weight.bits
    largest = codes.factor * (255 if codes.zero else 128) * (1 << (bits - codes.weight.symmetric))
    if not codes.float8 and codes.columns * largest >= LARGEST_SUM:
        return f"K={codes.columns}: expected less than {LARGEST_SUM // largest} columns, whose sums fit into 32 bits"
    return None


def code_operands(spec: KernelSpec, codes: Codes) -> list[Parameter]:
    """Pointers to everything that the product reads."""
    weight = FLOAT8 if codes.float8 else "u8" if codes.weight.bits == 4 else "i8"
    names = [name for name in ("codes", "scale", "zero", "w_codes", "w_scale", "w_zero") if spec.format(name)]
    return [pointer(name, weight if name == "w_codes" else stored(spec, name)) for name in names]


def code_layouts(codes: Codes) -> list[tuple[str, str]]:
    """How the weight's codes are laid out for the product."""
    return [("w_codes", "float8" if codes.float8 else "split-half-signed" if codes.weight.bits == 4 else "signed")]


def code_constants(codes: Codes) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers that the lines of this file refer to."""
    values = format_constants(codes.weight)
    if codes.x_grouped:
        values["X_GROUP"] = (codes.group, "columns of an activation that share a scale")
        values["X_GROUPS"] = (-(-codes.columns // codes.group), "scales in its row")
    return values


def explain_codes(codes: Codes) -> Lines:
    """A comment for the emitted source on how nibbles become numbers there."""
    return (
        ["# A signed nibble at the top of a byte is 16 times its number; the weight's scale takes that back."] if codes.factor > 1 else []
    )


def group_of(shift: str) -> str:
    """The first column of a part, as the numerator of its group."""
    return f"(first{shift})" if shift else "first"


def weight_scales(codes: Codes, row: str, group: str, mask: str, name: str) -> Lines:
    """`w_scale_NAME` float32 of a row and a group, and `w_zero_NAME` int32, as large as the weight's numbers are."""
    form = codes.weight
    lines = load(f"w_scale_{name}", f"w_scale + {row} * GROUPS + {group}", mask, suffix=".to(tl.float32)")
    if codes.factor > 1:
        lines.append(f"w_scale_{name} *= {1 / codes.factor}")
    if form.symmetric:
        return lines
    if form.bits == 8:
        return [*lines, *load(f"w_zero_{name}", f"w_zero + {row} * ZERO_ROW + {group}", mask, "0", ".to(tl.int32) - 128")]
    packed = load(f"packed_{name}", f"w_zero + {row} * ZERO_ROW + {group} // 2", mask, "0", ".to(tl.int32)")
    return [*lines, *packed, f"w_zero_{name} = (((packed_{name} >> ({group} % 2 * 4)) & 15) - 8) * {NIBBLE}"]


def activation_scales(codes: Codes, row: str, group: str, mask: str, name: str, shape: str) -> Lines:
    """`x_scale_NAME` float32 of a row and a group of an activation, and `x_zero_NAME` int32; `shape` is theirs where one serves all."""
    place = f"{row} * X_GROUPS + {group}" if codes.x_grouped else row
    lines = []
    for operand, kind, other in (("scale", "tl.float32", "0.0"), *((("zero", "tl.int32", "0"),) if codes.zero else ())):
        if codes.static:
            lines.append(f"x_{operand}_{name} = tl.full({shape}, tl.load({operand}), {kind})")
        else:
            lines += load(f"x_{operand}_{name}", f"{operand} + {place}", mask, other, f".to({kind})" if operand == "scale" else "")
    return lines
