"""The source lines that turn a stored weight into numbers."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.triton.contract import TRITON_TYPES
from qcompile.codegen.triton.elements import element_float32, scale_lines
from qcompile.codegen.triton.source import Lines, load
from qcompile.codegen.triton.weight_format import WeightFormat
from qcompile.ir.layouts import HALF, QUARTER, THREE_BIT_BLOCK

FLOAT32_CODE = "0x4B000000"
"""2^23 as float32: a code put into its low bits gives 2^23 + code, so a subtraction converts without a conversion instruction."""
FOUR_BIT_CODE = {"bf16": ("0x4300", 128), "fp16": ("0x6400", 1024)}
"""The same for 4-bit codes in 16-bit floats: pattern and the number it stands for."""


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
        before: a line that `codes` and `wide` need.
    """

    name: str
    codes: str
    wide: str
    factor: int
    offset: int
    before: str = ""


WHOLE = Part("all", "items", "wide", 1, 0)
"""Items that are one code each."""


def parts(form: WeightFormat) -> tuple[Part, ...]:
    """The parts of a load of items."""
    if form.element != "int":
        halves = (("low", "items & 15", 0), ("high", "items >> 4", HALF)) if form.bits == 4 else (("all", "items", 0),)
        return tuple(Part(name, f"code_{name}", "", 1, at, f"code_{name} = ({text}).to(tl.uint32)") for name, text, at in halves)
    if form.bits == 4:
        return Part("low", "items & 15", "(wide & 0x4B00000F)", 1, 0), Part("high", "items >> 4", "(wide & 0x4B0000F0)", 16, HALF)
    if form.bits == 2:
        pairs = ((name, 2 * place, hex(0x4B000000 | 3 << 2 * place)) for place, name in enumerate(QUARTERS))
        return tuple(Part(name, f"(items >> {low}) & 3", f"(wide & {mask})", 1 << low, QUARTER * low // 2) for name, low, mask in pairs)
    if form.bits == 3:
        return tuple(
            Part(name, f"code_{name}", f"(code_{name}.to(tl.uint32) | {FLOAT32_CODE})", 1, QUARTER * place, three_bits(name, place))
            for place, name in enumerate(QUARTERS)
        )
    return (WHOLE,)


QUARTERS = ("first", "second", "third", "fourth")
"""The parts of an item that holds four columns."""


def three_bits(name: str, place: int) -> str:
    """The line that puts a code of 3 bits together."""
    shift = f" >> {2 * place}" if place else ""
    items, tops = (f"({plane}{shift})" if place else plane for plane in ("items", "tops"))
    return f"code_{name} = ({items} & 3) | (({tops} & 1) << 2)"


def load_items(form: WeightFormat, source: str, row: str, spread: str, inside: str) -> Lines:
    """`items` at `item`, and for 3-bit codes `tops`, whose bits 0, 2, 4 and 6 are the third bits of the item's columns.

    Args:
        form: the format.
        source: the pointer.
        row: the rows as they broadcast, such as `row[:, None]`.
        spread: how `item` broadcasts, such as `[None, :]`.
        inside: which rows are there, as they broadcast.
    """
    if form.bits != 3:
        return load("items", f"{source} + {row} * ROW + item{spread}", f"{inside} & (item < ROW){spread}", "0")
    begin = f"{source} + {row} * ROW + (item // {QUARTER} * {THREE_BIT_BLOCK}"
    mask = f"{inside} & (item < ITEMS){spread}"
    return [
        *load("items", f"{begin} + item % {QUARTER}){spread}", mask, "0"),
        *load("tops", f"{begin} + {QUARTER} + item % {QUARTER // 2}){spread}", mask, "0"),
        f"tops = tops >> (item % {QUARTER} // {QUARTER // 2}).to(tl.uint8){spread}",
    ]


def widen(form: WeightFormat) -> Lines:
    """What the parts' `wide` refers to."""
    return [f"wide = items.to(tl.uint32) | {FLOAT32_CODE}"] if form.quantized and form.element == "int" and form.bits != 3 else []


def first_column(form: WeightFormat, item: str) -> str:
    """The column that a stored item holds in its first part."""
    return f"{item} // {form.span} * {2 * HALF} + {item} % {form.span}" if form.bits <= 4 else item


def explain_codes(form: WeightFormat, half: bool) -> Lines:
    """A comment for the emitted source on how codes become numbers there."""
    if not form.quantized:
        return []
    if form.element != "int":
        small = "# The bits of a small float, put where a large one keeps its own, are its number but for a power of two."
        return [] if form.element == "nf4" else [small]
    if half and form.bits <= 4:
        return ["# A code in the low bits of 128 (bfloat16 0x4300) or 1024 (float16 0x6400) is that number plus the code: no conversion."]
    return ["# A code in the low bits of 2^23 (float32 0x4B000000) is 2^23 plus the code: no conversion instruction."]


def float32_numbers(form: WeightFormat, part: Part, zero: str) -> str:
    """`(code - zero) · factor` in float32, exact; `zero` names float32 zero points, unused in a symmetric format."""
    if form.bits == 16:
        return f"{part.codes}.to(tl.float32)"
    if form.element != "int":
        return element_float32(form.element, part.codes)
    times = f"{float(part.factor)} * " if part.factor > 1 else ""
    middle = float((1 << 23) + (part.factor << (form.bits - 1)))
    offset = str(middle) if form.symmetric else f"({float(1 << 23)} + {times}{zero})"
    return f"{part.wide}.to(tl.float32, bitcast=True) - {offset}"


def half_numbers(form: WeightFormat, part: Part, zero: str, dtype: str) -> str:
    """`code - zero` in a 16-bit float, exact: both fit into its mantissa. 4-bit codes need no conversion instruction."""
    if form.bits == 16:
        return part.codes
    kind = TRITON_TYPES[dtype]
    if form.bits == 8 or form.element != "int":
        return f"({float32_numbers(form, part, zero)}).to({kind})"
    pattern, base = FOUR_BIT_CODE[dtype]
    offset = f"{float(base + (1 << (form.bits - 1)))}" if form.symmetric else f"({zero} + {float(base)}).to({kind})"
    return f"(({part.codes}).to(tl.uint16) | {pattern}).to({kind}, bitcast=True) - {offset}"


def load_scales(form: WeightFormat, row: str, group: str, mask: str, suffix: str) -> Lines:
    """Scale and zero point at `row`, `group`, both float32: variables `scale_SUFFIX`, `zero_SUFFIX`."""
    lines = scale_lines(form.scale_dtype, row, group, mask, suffix)
    if form.symmetric:
        return lines
    if form.bits == 8:
        return [*lines, *load(f"zero_{suffix}", f"zero + {row} * ZERO_ROW + {group}", mask, "0", ".to(tl.float32)")]
    return [*lines, *packed_zero(form.bits, row, group, mask, suffix)]


def packed_zero(bits: int, row: str, group: str, mask: str, suffix: str) -> Lines:
    """`zero_SUFFIX` float32 out of a row of zero points of less than 8 bits; one of 3 bits may begin in a byte and end in the next."""
    if bits != 3:
        per_byte = 8 // bits
        packed = load(f"packed_{suffix}", f"zero + {row} * ZERO_ROW + {group} // {per_byte}", mask, "0", ".to(tl.uint32)")
        return [*packed, f"zero_{suffix} = ((packed_{suffix} >> ({group} % {per_byte} * {bits})) & {(1 << bits) - 1}).to(tl.float32)"]
    bit = f"({group}) * 3"
    following = f"{mask} & ({bit} // 8 + 1 < ZERO_ROW)"
    return [
        *load(f"packed_{suffix}", f"zero + {row} * ZERO_ROW + {bit} // 8", mask, "0", ".to(tl.uint32)"),
        *load(f"next_{suffix}", f"zero + {row} * ZERO_ROW + {bit} // 8 + 1", following, "0", ".to(tl.uint32)"),
        f"zero_{suffix} = (((packed_{suffix} | (next_{suffix} << 8)) >> ({bit} % 8)) & 7).to(tl.float32)",
    ]


def format_constants(form: WeightFormat) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers that the lines of this file refer to."""
    unit = "bytes" if form.quantized else "numbers"
    values: dict[str, tuple[int | float, str]] = {"ROW": (form.row_stored, f"{unit} in a stored row of the weight")}
    if form.bits == 3:
        values["ITEMS"] = (form.row_items, "bytes of a row that hold the first two bits")
    if form.grouped:
        values["GROUP"] = (form.group, "columns that share a scale")
    if form.quantized:
        values["GROUPS"] = (form.groups, "scales in a row")
        if form.scale_dtype == "int8":
            values["RUNS2"] = (-(-form.groups // form.second_run), "second scales in a row")
            values["RUN2"] = (form.second_run, "scales that share a second one")
        if not form.symmetric:
            values["ZERO_ROW"] = (form.zero_row, "bytes of zero points in a row")
    return values
