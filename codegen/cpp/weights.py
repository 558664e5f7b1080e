"""How kernels over codes of activations read a weight: words of codes, each for one row of a tile."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.contract import stored
from qcompile.codegen.cpp.contract import TYPES
from qcompile.codegen.cpp.source import Lines
from qcompile.errors import FormatError
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.scheme import dtype_name

WIDTHS = (2, 4, 8)
"""Bits of the integer codes that are read: those that a byte holds a whole number of."""
MOST_GROUPS = 1024
"""Groups of a row with zero points: the sums of x over each of them stand on the stack."""


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in tiles of 16 rows (`qcompile.ir.layouts.tiles`).

    Attributes:
        bits: of a code.
        group: columns that share a scale, 0 for all of a row.
        scale: C++ type of the scales.
        zero: whether there are zero points.
    """

    bits: int
    group: int
    scale: str
    zero: bool = False

    @property
    def text(self) -> str:
        """In words."""
        return f"int{self.bits} codes, {f'groups of {self.group} columns' if self.group else 'one group a row'}, {self.scale} scales"

    @property
    def name(self) -> str:
        """What functions for this format begin with."""
        return f"int{self.bits}_{f'g{self.group}' if self.group else 'channel'}_{self.scale}{'_zero' if self.zero else ''}"

    @property
    def per_word(self) -> int:
        """Codes in a word of 32 bits."""
        return 32 // self.bits

    @property
    def middle(self) -> int:
        """The code of 0 without a zero point."""
        return 1 << (self.bits - 1)

    @property
    def scale_parameters(self) -> list[str]:
        """Parameters of a product beside the codes."""
        return [f"const {self.scale}* scale"] + ["const uint8_t* zero"] * self.zero

    @property
    def zero_stride(self) -> str:
        """Zero points from one tile to the next, in tiles' rows: whole bytes of packed ones."""
        per_byte = 8 // self.bits
        return "groups" if per_byte == 1 else f"((groups + {per_byte - 1}) / {per_byte} * {per_byte})"

    @property
    def scale_strides(self) -> list[tuple[str, str]]:
        """Operands beside the codes, and how many of theirs a row has."""
        return [("scale", "groups")] + [("zero", self.zero_stride)] * self.zero

    @property
    def zero_layout(self) -> str:
        """Of the zero points."""
        return "tiles" if self.bits == 8 else f"tiles-zero{self.bits}"

    @property
    def stride_constants(self) -> Lines:
        """How many words and scales a row has."""
        per, group = self.per_word, self.group
        lines = [f"const int64_t words = {'columns' if per == 1 else f'(columns + {per - 1}) / {per}'};"]
        return [*lines, f"const int64_t groups = {f'(columns + {group - 1}) / {group}' if group else '1'};"]


def _format(spec: KernelSpec) -> QuantFormat | str:
    text = stored(spec, "codes")
    try:
        return parse_format(text)
    except FormatError as error:
        return f"codes are {text!r}: {error}"


def refuses_weight(spec: KernelSpec) -> str | None:
    """Why the codes, scales and zero points of a specification cannot be read, or None."""
    form = _format(spec)
    if isinstance(form, str):
        return form
    if not form.element.is_integer or form.element.bits not in WIDTHS:
        return f"codes are {form.element.name}: expected {' or '.join(f'int{bits}' for bits in WIDTHS)}"
    if spec.format("scale") != dtype_name(form.scale_dtype):
        return f"scale is {spec.format('scale')}: expected {dtype_name(form.scale_dtype)} as the codes' format says"
    if (spec.format("zero") is None) != form.symmetric:
        return f"zero is {spec.format('zero')}: expected {'none for symmetric' if form.symmetric else 'uint8 for asymmetric'} codes"
    groups = form.granularity.groups(spec.size("K"))
    return f"{groups} groups with zero points: expected at most {MOST_GROUPS}" if groups > MOST_GROUPS and not form.symmetric else None


def weight_of(spec: KernelSpec) -> Weight:
    """The weight of a specification that is not refused."""
    form = _format(spec)
    assert isinstance(form, QuantFormat)
    group = form.granularity.size(spec.size("K"))
    return Weight(form.element.bits, 0 if group >= spec.size("K") else group, TYPES[dtype_name(form.scale_dtype)], not form.symmetric)
