"""How kernels over codes of activations read a weight: blocks of words of codes, each for one row of a tile (`planes.h`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompile.codegen.contract import FLOATS
from qcompile.codegen.cpp.contract import type_of
from qcompile.codegen.cpp.source import Lines
from qcompile.codegen.cpp.tiles import format_of, group_of, refuses_tiles
from qcompile.ir.lowered import KernelSpec

WIDTHS = range(2, 9)
"""Bits of the integer codes that are read."""


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in tiles of 16 rows (`qcompile.ir.layouts.tiles`).

    Attributes:
        bits: of a code.
        group: columns that share a scale, 0 for all of a row.
        scale: C++ type of the scales.
        zero: whether there are zero points.
        minimum: whether there are minima, what code 0 of a group stands for, in place of zero points.
    """

    bits: int
    group: int
    scale: str
    zero: bool
    minimum: bool

    @property
    def text(self) -> str:
        """In words."""
        groups = f"groups of {self.group} columns" if self.group else "one group a row"
        return f"int{self.bits} codes, {groups}, {self.scale} scales{', minima' * self.minimum}"

    @property
    def name(self) -> str:
        """What functions for this format begin with."""
        groups = f"g{self.group}" if self.group else "channel"
        return f"int{self.bits}_{groups}_{self.scale}{'_zero' * self.zero}{'_min' * self.minimum}"

    @property
    def block(self) -> int:
        """Columns of the shortest run that takes whole words of 32 bits."""
        return 32 // (self.bits & -self.bits)

    @property
    def block_words(self) -> int:
        """Words of a block."""
        return self.block * self.bits // 32

    @property
    def middle(self) -> int:
        """The code of 0 without a zero point."""
        return 1 << (self.bits - 1)

    @property
    def parameters(self) -> list[str]:
        """Parameters of a product beside the codes."""
        zero = ["const uint8_t* zero"] * self.zero + [f"const {self.scale}* zero"] * self.minimum
        return [f"const {self.scale}* scale", *zero]

    @property
    def zero_stride(self) -> str:
        """Zero points or minima from one tile to the next, in tiles' rows: of packed ones whole bytes."""
        return "groups" if self.minimum or self.bits == 8 else f"((groups * {self.bits} + 7) / 8 * 8 / {self.bits})"

    @property
    def strides(self) -> list[tuple[str, str]]:
        """Operands beside the codes, and how many of theirs a row has."""
        return [("scale", "groups")] + [("zero", self.zero_stride)] * (self.zero or self.minimum)

    @property
    def stride_constants(self) -> Lines:
        """How many words and scales a row has."""
        per, group = self.block, self.group
        words = f"(columns + {per - 1}) / {per}"
        return [
            f"const int64_t words = {words}{f' * {self.block_words}' if self.block_words > 1 else ''};",
            f"const int64_t groups = {f'(columns + {group - 1}) / {group}' if group else '1'};",
        ]


def plain(spec: KernelSpec) -> KernelSpec:
    """The specification of the weight by itself, as a weight-only product names it."""
    formats = [(name.removeprefix("w_"), kind) for name, kind in spec.formats if name.startswith("w_")]
    return replace(spec, formats=tuple(sorted(formats)))


def refuses_weight(spec: KernelSpec) -> str | None:
    """Why the codes, scales and zero points of a weight by itself are not multiplied as integers, or None."""
    reason = refuses_tiles(spec)
    if reason is not None:
        return reason
    form = format_of(spec)
    if form.element.is_integer and form.element.bits in WIDTHS and spec.format("scale") in FLOATS:
        return None
    return f"codes are {form}: expected int{WIDTHS[0]} to int{WIDTHS[-1]} with scales of {' or '.join(FLOATS)}"


def weight_of(spec: KernelSpec) -> Weight:
    """The weight of a specification that is not refused, by itself."""
    form = format_of(spec)
    zero = not (form.symmetric or form.minimum)
    return Weight(form.element.bits, group_of(spec), type_of(spec, "scale"), zero, form.minimum)
