"""Element types: what one quantized number can be."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import FormatError


@dataclass(frozen=True)
class ElementType:
    """An integer element of `bits` bits, stored as an unsigned code `value - low`.

    `low` and `high` are the least and the greatest value of the signed reading: int4 is -8..7, stored as 0..15.
    """

    name: str
    bits: int

    @property
    def low(self) -> int:
        """The least signed value."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest signed value."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """How many different values there are."""
        return 1 << self.bits


ELEMENTS = {f"int{bits}": ElementType(f"int{bits}", bits) for bits in range(2, 9)}
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
