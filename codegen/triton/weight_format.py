"""Weight formats: how a matrix is stored, and which of them kernels read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd

from qcompile.codegen.triton.contract import FLOATS
from qcompile.codegen.triton.elements import SCALE_STORAGE, SECOND_LEVEL, TABLES
from qcompile.ir.layouts import HALF, QUARTER, THREE_BIT_BLOCK, split_half_bytes
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.element import ELEMENTS, element


@dataclass(frozen=True)
class WeightFormat:
    """A stored weight [N, K]: 16-bit floats (`bits` 16, no scale) or codes of 8, 4, 3 or 2 bits with scales.

    `group` is the number of columns that share a scale; K or more means one scale per row. `element` is what a code stands for, and
    `super_group` the number of groups that share a second scale (0: all of a row).
    """

    bits: int
    group: int
    columns: int
    symmetric: bool = True
    scale_dtype: str = ""
    element: str = "int"
    super_group: int = 0

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
        """Stored items (bytes, or 16-bit floats) in a row, as the kernels see it: codes below 8 bits come in blocks of 128."""
        return split_half_bytes(self.columns) * self.span // HALF if self.bits <= 4 else self.columns

    @property
    def row_stored(self) -> int:
        """Items from one row to the next: third bits lie between the items of 3-bit codes."""
        return self.row_items // QUARTER * THREE_BIT_BLOCK if self.bits == 3 else self.row_items

    @property
    def span(self) -> int:
        """Items whose first columns lie side by side, those of a step of a matrix product."""
        return QUARTER if self.bits < 4 else HALF

    @property
    def layout(self) -> str:
        """The layout of the codes; empty where it is the artifact's own."""
        return {4: "split-half", 3: "split-planes", 2: "split-quarter"}.get(self.bits, "")

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        return 1 if self.quantized else 2

    @property
    def item_columns(self) -> int:
        """Columns in an item."""
        return 2 * HALF // self.span if self.bits <= 4 else 1

    @property
    def run(self) -> int:
        """Consecutive items that always share a scale: a power of two that divides the group, at most `span`."""
        return gcd(self.group, self.span) if self.grouped else self.span

    @property
    def gathers(self) -> bool:
        """Whether the columns of a step's part may lie in more than one group, so that each fetches its own scale."""
        return self.grouped and self.group % self.span != 0

    @property
    def second_run(self) -> int:
        """Groups that share a second scale, runs of a row being equal but for the last."""
        runs = -(-self.groups // self.super_group) if self.super_group else 1
        return -(-self.groups // runs)

    @property
    def zero_row(self) -> int:
        """Bytes in a row of packed zero points."""
        return -(-self.groups * self.bits // 8)


WIDTHS = (2, 3, 4, 8)
"""Bits of the codes that linear layers over 16-bit activations read."""


_FORMAT = rf"(?P<element>{'|'.join(ELEMENTS)}) (?:g(?P<group>\d+)|channel) (?P<kind>sym|asym) (?P<scale>\w+)(?:/(?P<super>\d+))?"


def parse_format(text: str, columns: int, widths: tuple[int, ...] = WIDTHS, tables: tuple[str, ...] = ()) -> WeightFormat | str:
    """Read what `str(QuantFormat)` wrote, such as `int4 g64 sym fp16`; a reason in words where no kernel can read it.

    `widths` are the integers that are understood, `tables` the other elements; with these also scales that are not floats.
    """
    match = re.fullmatch(_FORMAT, text)
    if match is None:
        return f"codes are {text!r}: expected a format such as 'int4 g64 sym fp16' or 'int8 channel sym fp16'"
    name = match["element"]
    bits = element(name).bits
    if name not in (*(f"int{width}" for width in widths), *tables):
        return f"codes are {name}: expected {' or '.join([*(f'int{width}' for width in widths), *tables])}"
    group = min(int(match["group"] or columns), columns)
    if group < 16 and group < columns:
        return f"groups of {group} columns: expected at least 16"
    scales = SCALE_STORAGE if tables else FLOATS
    if match["scale"] not in scales:
        return f"scales are {match['scale']}: expected {' or '.join(scales)}"
    return WeightFormat(bits, group, columns, match["kind"] == "sym", match["scale"], element(name).kind, int(match["super"] or 0))


def refuses_format(spec: KernelSpec, widths: tuple[int, ...] = WIDTHS, tables: tuple[str, ...] = ()) -> str | None:
    """Why the codes, scales and zero points of a specification cannot be read, or None."""
    form = parse_format(str(spec.format("codes")), spec.size("K"), widths, tables)
    if isinstance(form, str):
        return form
    if spec.format("scale") != SCALE_STORAGE[form.scale_dtype]:
        return f"scale is {spec.format('scale')}: expected {SCALE_STORAGE[form.scale_dtype]} as the codes' format says"
    if spec.format("scale2") != SECOND_LEVEL.get(form.scale_dtype):
        return f"scale2 is {spec.format('scale2')}: expected {SECOND_LEVEL.get(form.scale_dtype)} for {form.scale_dtype} scales"
    if (spec.format("zero") is None) != form.symmetric:
        return f"zero is {spec.format('zero')}: expected {'none for symmetric' if form.symmetric else 'uint8 for asymmetric'} codes"
    return None


def weight_format(spec: KernelSpec) -> WeightFormat:
    """The format of a specification that is not refused."""
    text = spec.format("codes")
    if text is None:
        return WeightFormat(16, spec.size("K"), spec.size("K"))
    form = parse_format(text, spec.size("K"), tables=TABLES)
    assert isinstance(form, WeightFormat)
    return form


def weight_operands(spec: KernelSpec) -> tuple[str, ...]:
    """The pointers that hold the weight, in the order of the parameters."""
    return tuple(name for name in ("weight", "codes", "scale", "scale2", "zero") if spec.format(name) is not None)
