"""Codes of vectors that a cache packs token by token, as attention reads them, whatever gives them their size.

A *part* of a group is what one place of its items holds, which are bytes or pairs of bytes: every channel of 8-bit codes, every second or
fourth of 4-bit ones, every fourth of 2-bit ones. Each part is multiplied by itself, with queries or into sums that hold the same channels,
so that nothing moves between lanes. A group is what is multiplied at once.

The walk over a cache leaves `first_slot`, a number of a place in all pages, and `row` [BLOCK_T], how far from there a token's place is; and
`present`, which tokens are there. Variables of a group g and a part p of it are called `NAME_g_p`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from qcompile.codegen.triton.contract import TRITON_TYPES
from qcompile.codegen.triton.elements import element_float32
from qcompile.codegen.triton.source import Lines, load
from qcompile.codegen.triton.tiles import power_of_two
from qcompile.quant.packing import packed_bytes
from qcompile.quant.vector_format import VectorForm

LEAST_LANES = 16
"""The narrowest side of a matrix product."""
WHOLE_BITS = (2, 4, 8)
"""Codes that no byte cuts."""


@dataclass(frozen=True)
class Part:
    """Channels `first`, `first` + `step` … (`count` of them) of group `group`: those at `place` in its bytes."""

    group: int
    place: int
    first: int
    step: int
    count: int


@dataclass(frozen=True)
class PackedCodes(ABC):
    """Vectors of `size` numbers as codes, with what gives them their size behind; codes are loaded `item` bytes at a time."""

    form: VectorForm
    size: int
    item: int = 1

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Groups of a token."""

    @property
    @abstractmethod
    def share(self) -> int:
        """Numbers that share a scale or a power of two."""

    @property
    def width(self) -> int:
        """W, bytes of a token."""
        return self.form.width(self.size)

    @property
    def is_float(self) -> bool:
        """Whether codes are floats of 8 bits."""
        return False

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def per_item(self) -> int:
        """Codes in an item."""
        return self.per_byte * self.item

    @property
    def group(self) -> int:
        """Numbers of a group."""
        return self.size // self.groups

    @property
    def group_bytes(self) -> int:
        """Bytes of a group's codes."""
        return -(-self.group // self.per_byte)

    @property
    def group_items(self) -> int:
        """Items of a group's codes."""
        return self.group_bytes // self.item

    @property
    def lanes(self) -> int:
        """The items of a group's codes, padded to what a product takes."""
        return max(LEAST_LANES, power_of_two(self.group_items))

    @property
    def in_pairs(self) -> Self:
        """Codes of 4 bits two bytes at a time, as wide as the numbers they become, where addresses allow it and no lane is wasted."""
        fits = self.even and self.group_bytes % 2 == 0 and self.group_bytes >= 2 * LEAST_LANES
        return replace(self, item=2) if self.bits == 4 and fits else self

    @property
    def body(self) -> int:
        """Bytes of a token's codes: scales begin behind them."""
        return packed_bytes(self.size, self.bits)

    @property
    def even(self) -> bool:
        """Whether codes and what lies behind them begin at even addresses."""
        return self.body % 2 == 0 and self.width % 2 == 0

    def parts(self, group: int) -> list[Part]:
        """The parts of a group."""
        step = self.per_item
        return [Part(group, place, group * self.group + place, step, -(-(self.group - place) // step)) for place in range(step)]

    def all_parts(self) -> Iterator[Part]:
        """The parts of every group."""
        for group in range(self.groups):
            yield from self.parts(group)


def lane_lines(vectors: PackedCodes, name: str) -> Lines:
    """`NAME_lane`: the items of a group."""
    return [f"{name}_lane = tl.arange(0, {vectors.lanes})"]


def channel(part: Part, name: str) -> str:
    """The channel of each lane of a part, given `NAME_lane`."""
    times = f"{part.step} * " if part.step > 1 else ""
    return f"{times}{name}_lane{f' + {part.first}' if part.first else ''}"


def within(vectors: PackedCodes, part: Part, name: str) -> str:
    """Which lanes of a part are channels; empty where all are."""
    return "" if part.count == vectors.lanes else f"{name}_lane < {part.count}"


def cell_lines(vectors: PackedCodes, name: str, source: str) -> Lines:
    """`NAME_page`, a pointer, and `NAME_cell`, the bytes [BLOCK_T] from there to each token."""
    return [f"{name}_page = {source} + first_slot * {vectors.width}", f"{name}_cell = row * {vectors.width}"]


def item_lines(vectors: PackedCodes, group: int, name: str, *, turned: bool) -> Lines:
    """`NAME_items_g`, [BLOCK_T, lanes], or [lanes, BLOCK_T] if turned, of the tokens at `NAME_cell` where `present`."""
    token, lane = ("[None, :]", "[:, None]") if turned else ("[:, None]", "[None, :]")
    item = f"({name}_lane + {group * vectors.group_items})" if group else f"{name}_lane"
    mask = f"present{token}"
    if vectors.group_items < vectors.lanes:
        mask += f" & ({name}_lane < {vectors.group_items}){lane}"
    if vectors.item == 1:
        return load(f"{name}_items_{group}", f"{name}_page + {name}_cell{token} + {item}{lane}", mask, "0")
    return load(f"{name}_items_{group}", f"({name}_page + {name}_cell{token}).to(tl.pointer_type(tl.uint16)) + {item}{lane}", mask, "0")


def number_lines(vectors: PackedCodes, part: Part, name: str, kind: str) -> Lines:
    """`NAME_g_p`, the centred codes of a part as the 16-bit type `kind` (bf16, fp16), which holds each of them exactly."""
    packed = f"{name}_items_{part.group}"
    mask = (1 << vectors.bits) - 1
    code = packed if vectors.bits == 8 else f"({packed} & {mask})" if part.place == 0 else f"({packed} >> {part.place * vectors.bits})"
    if 0 < part.place < vectors.per_item - 1:
        code = f"({code} & {mask})"
    return [f"{name}_{part.group}_{part.place} = {numbers(vectors, code, kind)}"]


def numbers(vectors: PackedCodes, code: str, kind: str) -> str:
    """The number of a code, an unsigned tensor, in the 16-bit type `kind`: exact, and no conversion instruction where bits will do."""
    half, tl_kind = 1 << (vectors.bits - 1), TRITON_TYPES[kind]
    if vectors.is_float:
        if kind == "fp16":
            return f"((({code}.to(tl.uint16) & 127) << 7) | (({code}.to(tl.uint16) & 128) << 8)).to(tl.float16, bitcast=True) * 256.0"
        return f"({element_float32('fp8', f'{code}.to(tl.uint32)')}).to({tl_kind})"
    if vectors.bits <= 4 and kind == "bf16":
        return f"({code}.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - {128.0 + half}"
    if kind == "fp16":
        return f"({code}.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - {1024.0 + half}"
    return f"(({code}.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - {float((1 << 23) + half)}).to({tl_kind})"
