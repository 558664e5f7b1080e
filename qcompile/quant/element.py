"""Element types: what one quantized number can be."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.errors import FormatError


@dataclass(frozen=True)
class ElementType:
    """A number of `bits` bits: an integer, or an entry of a table.

    An integer is stored as the unsigned code `value - low`: int4 is -8..7, stored as 0..15. A table (`values`) gives the number that each
    code stands for. fp8 has neither: its code is the bit pattern of float8_e4m3fn. `largest` is the greatest magnitude, 0 for integers.
    """

    name: str
    bits: int
    values: tuple[float, ...] | None = field(default=None, repr=False)
    largest: float = 0.0

    @property
    def kind(self) -> str:
        """What operators call it: `int` for integers of any width, else the name."""
        return "int" if self.is_integer else self.name

    @property
    def is_integer(self) -> bool:
        """Whether neighbouring codes are one step apart, so that a zero point makes sense."""
        return self.largest == 0

    @property
    def low(self) -> int:
        """The least signed value of an integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest signed value of an integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

NF4 = ElementType("nf4", 4, _NF4, 1.0)
"""Quantiles of a normal distribution (QLoRA, arXiv:2305.14314), in the order of bitsandbytes."""
FP4 = ElementType("fp4", 4, (*_E2M1, *(-value for value in _E2M1)), 6.0)
"""e2m1, the code is its bit pattern (OCP Microscaling Formats 1.0)."""
FP8 = ElementType("fp8", 8, None, 448.0)
"""e4m3 without infinities (arXiv:2209.05433)."""

ELEMENTS = {**{f"int{bits}": ElementType(f"int{bits}", bits) for bits in range(2, 9)}, "nf4": NF4, "fp4": FP4, "fp8": FP8}
INT4 = ELEMENTS["int4"]
INT8 = ELEMENTS["int8"]


def element(name: str) -> ElementType:
    """The element type called `name`.

    Raises:
        FormatError: for a name that is not in `ELEMENTS`.
    """
    try:
        return ELEMENTS[name]
    except KeyError:
        raise FormatError(f"element type {name!r}: expected one of {', '.join(ELEMENTS)}") from None


def element_of(kind: str, bits: int) -> ElementType:
    """The element type that an operator calls `kind`, of `bits` bits.

    Raises:
        FormatError: if there is none of that width.
    """
    found = element(f"int{bits}" if kind == "int" else kind)
    if found.bits != bits:
        raise FormatError(f"element type {kind!r}: expected {found.bits} bits, got {bits}")
    return found
