"""Weight formats: how a matrix is stored, and the source lines that turn what is stored into numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd

from qcompile.codegen.triton.contract import FLOATS, TRITON_TYPES
from qcompile.codegen.triton.source import Lines, load
from qcompile.ir.layouts import HALF, split_half_bytes
from qcompile.ir.lowered import KernelSpec

FLOAT32_CODE = "0x4B000000"
"""2^23 as float32: a code put into its low bits gives 2^23 + code, so a subtraction converts without a conversion instruction."""
FOUR_BIT_CODE = {"bf16": ("0x4300", 128), "fp16": ("0x6400", 1024)}
"""The same for 4-bit codes in 16-bit floats: pattern and the number it stands for."""


@dataclass(frozen=True)
class WeightFormat:
    """A stored weight [N, K]: 16-bit floats (`bits` 16, no scale) or codes of 8 or 4 bits with scales.

    `group` is the number of columns that share a scale; K or more means one scale per row.
    """

    bits: int
    group: int
    columns: int
    symmetric: bool = True
    scale_dtype: str = ""

    @property
    def quantized(self) -> bool:
        """Whether there are scales."""
        return self.bits < 16

    @property
    def grouped(self) -> bool:
        """Whether a row has more than one scale."""
        return self.quantized and self.group < self.columns

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return -(-self.columns // self.group)

    @property
    def row_items(self) -> int:
        """Stored items (bytes, or 16-bit floats) in a row, as the kernels see it: 4-bit rows are laid out by `split-half`."""
        return split_half_bytes(self.columns) if self.bits == 4 else self.columns

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        return 1 if self.quantized else 2

    @property
    def item_columns(self) -> int:
        """Columns in an item."""
        return 2 if self.bits == 4 else 1

    @property
    def run(self) -> int:
        """Consecutive items that always share a scale: a power of two that divides the group, at most `HALF`."""
        return gcd(self.group, HALF) if self.grouped else HALF

    @property
    def gathers(self) -> bool:
        """Whether the 64 columns of a step may lie in more than one group, so that each fetches its own scale."""
        return self.grouped and self.group % HALF != 0

    @property
    def zero_row(self) -> int:
        """Bytes in a row of packed zero points."""
        return -(-self.groups * self.bits // 8)


def parse_format(text: str, columns: int) -> WeightFormat | str:
    """Read what `str(QuantFormat)` wrote, such as `int4 g64 sym fp16`; a reason in words where no kernel can read it."""
    match = re.fullmatch(r"int(?P<bits>\d+) (?:g(?P<group>\d+)|channel) (?P<kind>sym|asym) (?P<scale>\w+)", text)
    if match is None:
        return f"codes are {text!r}: expected a format such as 'int4 g64 sym fp16' or 'int8 channel sym fp16'"
    bits = int(match["bits"])
    if bits not in (4, 8):
        return f"codes are int{bits}: expected int4 or int8"
    group = min(int(match["group"] or columns), columns)
    if group < 16 and group < columns:
        return f"groups of {group} columns: expected at least 16"
    if match["scale"] not in FLOATS:
        return f"scales are {match['scale']}: expected {' or '.join(FLOATS)}"
    return WeightFormat(bits, group, columns, match["kind"] == "sym", match["scale"])


def refuses_format(spec: KernelSpec) -> str | None:
    """Why the codes, scales and zero points of a specification cannot be read, or None."""
    form = parse_format(str(spec.format("codes")), spec.size("K"))
    if isinstance(form, str):
        return form
    if spec.format("scale") != form.scale_dtype:
        return f"scale is {spec.format('scale')}: expected {form.scale_dtype} as the codes' format says"
    if (spec.format("zero") is None) != form.symmetric:
        return f"zero is {spec.format('zero')}: expected {'none for symmetric' if form.symmetric else 'uint8 for asymmetric'} codes"
    return None


def weight_format(spec: KernelSpec) -> WeightFormat:
    """The format of a specification that is not refused."""
    text = spec.format("codes")
    if text is None:
        return WeightFormat(16, spec.size("K"), spec.size("K"))
    form = parse_format(text, spec.size("K"))
    assert isinstance(form, WeightFormat)
    return form


@dataclass(frozen=True)
class Part:
    """The columns that one load of `items` gives at a time: all of them, or those in the low or the high nibbles.

    Attributes:
        name: suffix of the part's variables.
        codes: the codes as uint8.
        wide: the codes times `factor` in the low bits of 2^23, as uint32, from the variable `wide` that `widen` leaves: high nibbles
            are masked and not shifted, which saves an instruction a weight where the kernel is bound by them.
        factor: 16 for high nibbles.
        offset: how far the part's columns lie from the first part's.
    """

    name: str
    codes: str
    wide: str
    factor: int
    offset: int


WHOLE = Part("all", "items", "wide", 1, 0)
"""Items that are one code each."""


def parts(form: WeightFormat) -> tuple[Part, ...]:
    """The parts of a load of items."""
    if form.bits == 4:
        return Part("low", "items & 15", "(wide & 0x4B00000F)", 1, 0), Part("high", "items >> 4", "(wide & 0x4B0000F0)", 16, HALF)
    return (WHOLE,)


def widen(form: WeightFormat) -> Lines:
    """What the parts' `wide` refers to."""
    return [f"wide = items.to(tl.uint32) | {FLOAT32_CODE}"] if form.quantized else []


def first_column(form: WeightFormat, item: str) -> str:
    """The column that a stored item holds in its first part."""
    return f"{item} // {HALF} * {2 * HALF} + {item} % {HALF}" if form.bits == 4 else item


def explain_codes(form: WeightFormat, half: bool) -> Lines:
    """A comment for the emitted source on how codes become numbers there."""
    if not form.quantized:
        return []
    if half and form.bits == 4:
        return ["# A code in the low bits of 128 (bfloat16 0x4300) or 1024 (float16 0x6400) is that number plus the code: no conversion."]
    return ["# A code in the low bits of 2^23 (float32 0x4B000000) is 2^23 plus the code: no conversion instruction."]


def float32_numbers(form: WeightFormat, part: Part, zero: str) -> str:
    """`(code - zero) · factor` in float32, exact; `zero` names float32 zero points, unused in a symmetric format."""
    if form.bits == 16:
        return f"{part.codes}.to(tl.float32)"
    times = f"{float(part.factor)} * " if part.factor > 1 else ""
    middle = float((1 << 23) + (part.factor << (form.bits - 1)))
    offset = str(middle) if form.symmetric else f"({float(1 << 23)} + {times}{zero})"
    return f"{part.wide}.to(tl.float32, bitcast=True) - {offset}"


def half_numbers(form: WeightFormat, part: Part, zero: str, dtype: str) -> str:
    """`code - zero` in a 16-bit float, exact: both fit into its mantissa. 4-bit codes need no conversion instruction."""
    if form.bits == 16:
        return part.codes
    kind = TRITON_TYPES[dtype]
    if form.bits == 8:
        return f"({float32_numbers(form, part, zero)}).to({kind})"
    pattern, base = FOUR_BIT_CODE[dtype]
    offset = f"{float(base + 8)}" if form.symmetric else f"({zero} + {float(base)}).to({kind})"
    return f"(({part.codes}).to(tl.uint16) | {pattern}).to({kind}, bitcast=True) - {offset}"


def load_scales(form: WeightFormat, row: str, group: str, mask: str, suffix: str) -> Lines:
    """Scale and zero point at `row`, `group`, both float32: variables `scale_SUFFIX`, `zero_SUFFIX`."""
    lines = load(f"scale_{suffix}", f"scale + {row} * GROUPS + {group}", mask, suffix=".to(tl.float32)")
    if form.symmetric:
        return lines
    if form.bits == 8:
        return [*lines, *load(f"zero_{suffix}", f"zero + {row} * ZERO_ROW + {group}", mask, "0", ".to(tl.float32)")]
    packed = load(f"packed_{suffix}", f"zero + {row} * ZERO_ROW + {group} // 2", mask, "0", ".to(tl.uint32)")
    return [*lines, *packed, f"zero_{suffix} = ((packed_{suffix} >> ({group} % 2 * 4)) & 15).to(tl.float32)"]


def format_constants(form: WeightFormat) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers that the lines of this file refer to."""
    unit = "bytes" if form.quantized else "numbers"
    values: dict[str, tuple[int | float, str]] = {"ROW": (form.row_items, f"{unit} in a stored row of the weight")}
    if form.grouped:
        values["GROUP"] = (form.group, "columns that share a scale")
    if form.quantized:
        values["GROUPS"] = (form.groups, "scales in a row")
        if not form.symmetric:
            values["ZERO_ROW"] = (form.zero_row, "bytes of zero points in a row")
    return values


def weight_operands(spec: KernelSpec) -> tuple[str, ...]:
    """The pointers that hold the weight, in the order of the parameters."""
    return tuple(name for name in ("weight", "codes", "scale", "zero") if spec.format(name) is not None)
