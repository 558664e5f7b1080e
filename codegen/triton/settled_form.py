"""How a settled vector lies in its page, for kernels: what they can read and write, and the numbers of it.

Vectors with scales (`quant/vector_format.py`) are described here, blocks that share a power of two in `block_vectors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.triton.block_vectors import BlockVectors, refuses_block
from qcompile.errors import FormatError
from qcompile.quant.element import FP8
from qcompile.quant.packing import packed_bytes
from qcompile.quant.vector_format import VectorFormat, vector_format
from qcompile.quant.vectors.block import BlockFormat

BITS = (2, 4, 8)
LONGEST_GROUP = 128
"""Tokens of one channel that a program holds at once."""


@dataclass(frozen=True)
class Packed:
    """A format with scales at a head size of D; `name` is what its constants begin with (`KEY_BYTES`).

    The bytes of t tokens: codes [D, t·B/8] per channel or [D·B/8] per token (t = 1), scales [groups] and least values [groups] in float16.
    """

    form: VectorFormat
    size: int
    name: str = ""

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.form.element.bits

    @property
    def per_byte(self) -> int:
        """Codes in a byte: consecutive tokens of a channel, or consecutive channels of a token."""
        return 8 // self.bits

    @property
    def per_channel(self) -> bool:
        """Whether tokens of one channel share a scale."""
        return self.form.tokens > 1

    @property
    def groups(self) -> int:
        """Scales of t tokens."""
        return self.form.groups(self.size)

    @property
    def share(self) -> int:
        """Numbers that share a scale."""
        return self.form.tokens if self.per_channel else self.size // self.groups

    @property
    def body(self) -> int:
        """Bytes of the codes of t tokens."""
        return packed_bytes(self.form.tokens * self.size, self.bits)

    @property
    def width(self) -> int:
        """W, bytes of a token."""
        return self.form.width(self.size)

    @property
    def zero(self) -> float:
        """What is taken from a code; a least value does the same for asymmetric ones."""
        return float(-self.form.element.low) if self.form.symmetric else 0.0

    def constant(self, text: str) -> str:
        """The name of one of its compile-time numbers."""
        return f"{self.name}_{text}" if self.name else text

    def constants(self) -> dict[str, tuple[int | float, str]]:
        """The compile-time numbers that lines about it refer to."""
        numbers: dict[str, tuple[int | float, str]] = {
            "BYTES": (self.width, "bytes of a packed token"),
            "BODY": (self.body, "bytes of codes before the scales"),
            "GROUPS": (self.groups, "scales of the tokens that are packed together"),
        }
        return {self.constant(text): value for text, value in numbers.items()}


SettledForm = Packed | BlockVectors


def settled_form(text: str, size: int, name: str = "") -> SettledForm:
    """The format written as `text` for heads of `size` numbers, where `refuses_form` has nothing against it."""
    form = vector_format(text)
    if isinstance(form, BlockFormat):
        return BlockVectors(form, size)
    assert isinstance(form, VectorFormat)
    return Packed(form, size, name)


def refuses_form(option: str, text: object, size: int) -> str | None:
    """Why kernels cannot read or write vectors of `size` numbers in the format `text`, or None."""
    try:
        form = vector_format(str(text))
        width = form.width(size)
    except FormatError as error:
        return f"{option}: {error}"
    if isinstance(form, BlockFormat):
        reason = refuses_block(form, size)
        return reason and f"{option} is {text!r}: {reason}"
    if not isinstance(form, VectorFormat) or (form.element != FP8 and form.element.bits not in BITS):
        return f"{option} is {text!r}: expected fp8 or integers of {', '.join(map(str, BITS))} bits with a scale per group, or bfp"
    return refuses_groups(option, Packed(form, size)) or (
        f"{option} is {text!r}: expected an even number of bytes where {form.tokens} tokens lie together, got {width * form.tokens}"
        if width * form.tokens % 2
        else None
    )


def refuses_groups(option: str, form: Packed) -> str | None:
    """Groups that no reshape cuts out of a tile, or that begin inside a byte."""
    several = form.per_channel or form.groups > 1
    if several and form.share & (form.share - 1):
        return f"{option}: groups of {form.share}: expected a power of two"
    if form.share % form.per_byte:
        return f"{option}: groups of {form.share}: expected a multiple of the {form.per_byte} codes in a byte"
    if form.per_channel and form.share > LONGEST_GROUP:
        return f"{option}: groups of {form.share} tokens: expected at most {LONGEST_GROUP}"
    return None
