"""Formats of the vectors in a cache: what each token of a head takes in a page, as bytes.

Shape letters: T tokens, D head size, t tokens that are encoded together, g numbers that share a scale, W bytes of a token.

The bytes of t tokens are their codes, low bits first, then scales and, unless symmetric, least values, all in float16: per token (t = 1,
groups of channels) or per channel (groups of t tokens, channel after channel; the keys of KIVI, arXiv:2402.02750).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.element import FP8, ElementType, element
from qcompile.quant.packing import pack, packed_bytes, unpack

_PATTERN = re.compile(r"(?P<element>int[2-8]|fp8)( (?P<axis>[gt])(?P<group>[1-9]\d*))?( (?P<kind>sym|asym))?")
_HALF = 2
"""Bytes of a float16."""


class VectorForm(Protocol):
    """A way to store vectors [D]; further ones are in `qcompile/quant/vectors`."""

    @property
    def tokens(self) -> int:
        """t: vectors that are encoded together."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tensors that `calibrate` makes and `encode` and `decode` take; empty for most forms."""

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers.

        Raises:
            FormatError: if vectors of that size cannot be stored.
        """

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The tables for vectors like x [N, L, D] (N tokens, L heads), of which an error in channel d counts `importance` [L, D]."""

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D], T a multiple of t, as uint8 [..., L, T, W]."""

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Invert `encode`: [..., L, T, D] as `dtype`."""


@dataclass(frozen=True)
class VectorFormat:
    """How vectors [D] are stored; as text `int4 g64 asym` per token, `int4 t32 asym` per channel of 32 tokens.

    Attributes:
        element: an integer of 2 to 8 bits, or fp8.
        group: g; a head size that it does not divide is one group, as for -1. Not used per channel.
        symmetric: codes have a sign and no least value is stored; fp8 always.
        tokens: t; more than 1 is per channel.
    """

    element: ElementType
    group: int = -1
    symmetric: bool = False
    tokens: int = 1
    tables: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        group = f" t{self.tokens}" if self.tokens > 1 else "" if self.group == -1 else f" g{self.group}"
        return f"{self.element.name}{group} {'sym' if self.symmetric else 'asym'}"

    def groups(self, size: int) -> int:
        """Groups of t vectors of `size` numbers."""
        if self.tokens > 1:
            return size
        return 1 if self.group == -1 or size % self.group else size // self.group

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers; where t of them do not share bytes evenly, a group ends in some that mean nothing."""
        return -(-self._together_bytes(size) // self.tokens)

    def _together_bytes(self, size: int) -> int:
        """Of t vectors: codes, then scales and least values."""
        return packed_bytes(self.tokens * size, self.element.bits) + self.groups(size) * (_HALF if self.symmetric else 2 * _HALF)

    def bits(self, size: int) -> float:
        """Of storage for each number of a vector of `size`."""
        return 8 * self.width(size) / size

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """No tables: scales are stored with the codes."""
        del x, importance
        return ()

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """Quantize vectors x [..., T, D], T a multiple of t (any shape [..., D] where t is 1): uint8 [..., T, W].

        `x ≈ least + code · scale` with `scale = (max - min) / (levels - 1)`, symmetric `x ≈ code · scale` with the largest magnitude at the
        largest code. Scale and least value are rounded to float16 first, so a number is at most half a step (and what float16 adds) away.
        """
        del tables
        size = x.shape[-1]
        groups = self._together(x.to(torch.float32))
        codes, parts = self._signed(groups) if self.symmetric else self._unsigned(groups)
        flat = codes.view(-1, self.tokens * size)
        body = flat if self.element == FP8 else pack(flat, self.element.bits)
        together = torch.cat((body, *(part.view(len(flat), -1).view(torch.uint8) for part in parts)), dim=-1)
        together = torch.nn.functional.pad(together, (0, self.tokens * self.width(size) - together.shape[1]))
        return together.view(*x.shape[:-1], self.width(size))

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Invert `encode`: uint8 [..., T, W] to [..., T, D] as `dtype`."""
        del tables
        count, groups = self.tokens * size, self.groups(size)
        rows = packed.reshape(-1, self.tokens * packed.shape[-1])
        body = packed_bytes(count, self.element.bits)
        codes = self._numbers(rows[:, :body].contiguous(), count).view(len(rows), groups, -1)
        # A copy: halves must lie at even addresses.
        halves = (
            rows[:, body : self._together_bytes(size)].clone(memory_format=torch.contiguous_format).view(torch.float16).to(torch.float32)
        )
        scale, *least = halves.view(len(rows), -1, groups, 1).unbind(1)
        values = codes * scale + least[0] if least else codes * scale
        if self.tokens > 1:
            values = values.transpose(1, 2)
        return values.reshape(*packed.shape[:-1], size).to(dtype)

    def _together(self, x: Tensor) -> Tensor:
        """What shares a scale side by side: [N, groups, g]."""
        if self.tokens > 1:
            return x.reshape(-1, self.tokens, x.shape[-1]).transpose(1, 2).contiguous()
        return x.reshape(-1, self.groups(x.shape[-1]), x.shape[-1] // self.groups(x.shape[-1]))

    def _numbers(self, body: Tensor, size: int) -> Tensor:
        """Codes uint8 [N, bytes] as float32 [N, D], with their sign."""
        if self.element == FP8:
            return body.view(torch.float8_e4m3fn).to(torch.float32)
        codes = unpack(body, self.element.bits, size).to(torch.float32)
        return codes + self.element.low if self.symmetric else codes

    def _unsigned(self, groups: Tensor) -> tuple[Tensor, list[Tensor]]:
        top = self.element.levels - 1
        least = groups.amin(-1, keepdim=True).to(torch.float16)
        scale = _usable((groups.amax(-1, keepdim=True) - least.float()) / top)
        codes = ((groups - least.float()) / scale.float()).round_().clamp_(0, top)
        return codes.to(torch.uint8), [scale, least]

    def _signed(self, groups: Tensor) -> tuple[Tensor, list[Tensor]]:
        largest = groups.abs().amax(-1, keepdim=True)
        if self.element == FP8:
            scale = _usable(largest / FP8.largest)
            codes = (groups / scale.float()).clamp_(-FP8.largest, FP8.largest).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8), [scale]
        low, high = self.element.low, self.element.high
        scale = _usable(largest / high)
        return (groups / scale.float()).round_().clamp_(low, high).sub_(low).to(torch.uint8), [scale]


def _usable(scale: Tensor) -> Tensor:
    """In float16, at least its least normal number: nothing is divided by 0."""
    return scale.clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16)


@functools.cache
def vector_format(text: str) -> VectorForm:
    """Read a form: `int4`, `int4 g64`, `int8 sym`, `fp8`, `int4 t32 asym`, or one of `qcompile/quant/vectors`.

    Raises:
        FormatError: saying what is expected.
    """
    from qcompile.quant.vectors import FAMILIES  # forms hold forms, which they read with this function

    for read in FAMILIES.values():
        form = read(text)
        if form is not None:
            return form
    return uniform_format(text)


def uniform_format(text: str) -> VectorFormat:
    """Read `int4 g64 asym` and its kind: integers are asymmetric unless it says `sym`.

    Raises:
        FormatError: saying what is expected, of all forms.
    """
    from qcompile.quant.vectors import FAMILIES

    match = _PATTERN.fullmatch(text)
    if match is None or (match["element"] == "fp8" and match["kind"] == "asym"):
        raise FormatError(
            f"cache format {text!r}: expected int2 to int8 or fp8, then g and channels or t and tokens that share a scale, sym or "
            f"asym, such as 'int4 g64 asym'; or {', '.join(FAMILIES)}"
        )
    kind = FP8 if match["element"] == "fp8" else element(match["element"])
    symmetric = match["kind"] == "sym" or kind == FP8
    if match["axis"] == "t":
        return VectorFormat(kind, symmetric=symmetric, tokens=int(match["group"]))
    return VectorFormat(kind, int(match["group"] or -1), symmetric)
