"""Block floating point (`qcompile/quant/vectors/block.py`), as attention reads it.

A code of few bits times a power of two is a bfloat16, exactly: powers meet the codes, all blocks of a token are multiplied at once, and
nothing is rounded but what attention over bfloat16 rounds too. A float16 ends at 65504 and is what the number rounds to.

Where channels are sorted, keys stay as they are stored and queries are read in their order; sums of values are stored to the channels that
they are sums of.

Variables are called `NAME_power`, those of a part p `NAME_channel_p`; the others are those of `packed_codes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.triton.cache_tiles import KeyTile, Sum, ValueTile
from qcompile.codegen.triton.contract import TRITON_TYPES
from qcompile.codegen.triton.packed_codes import (
    WHOLE_BITS,
    PackedCodes,
    Part,
    cell_lines,
    channel,
    item_lines,
    lane_lines,
    within,
)
from qcompile.codegen.triton.packed_codes import number_lines as code_lines
from qcompile.codegen.triton.source import Lines, load
from qcompile.quant.vectors.block import BlockFormat

LARGEST_HALF = 65504.0
"""The largest float16."""
LEAST_COLUMNS = 32
"""Of a sum: eight for each of four warps, where fewer would be multiplied several times over."""


@dataclass(frozen=True)
class BlockVectors(PackedCodes):
    """Vectors as codes and a power of two for each block of them: one group."""

    form: BlockFormat

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.form.bits

    @property
    def groups(self) -> int:
        """What is multiplied at once: everything."""
        return 1

    @property
    def blocks(self) -> int:
        """Powers of a token."""
        return self.form.blocks(self.size)

    @property
    def share(self) -> int:
        """Numbers of a block share a power."""
        return self.size // self.blocks

    @property
    def in_pairs(self) -> BlockVectors:
        """Two bytes at a time where no pair has codes of two blocks."""
        pairs = super().in_pairs
        return self if self.blocks > 1 and self.share % pairs.per_item else pairs

    @property
    def block_lanes(self) -> int:
        """Lanes that share a power: all where there is one."""
        return self.lanes if self.blocks == 1 else self.share // self.per_item


def refuses_block(form: BlockFormat, size: int) -> str | None:
    """Why kernels do not read vectors of `size` numbers in this form, or None."""
    vectors = BlockVectors(form, size)
    if vectors.bits not in WHOLE_BITS:
        return "expected codes of 2, 4 or 8 bits"
    if vectors.blocks > 1 and (vectors.share & (vectors.share - 1) or vectors.share % vectors.per_byte):
        return f"expected blocks of a power of two, {vectors.per_byte} channels or more, got {vectors.share}"
    return None


def power_lines(vectors: BlockVectors, name: str, kind: str, *, turned: bool) -> Lines:
    """`NAME_power` [BLOCK_T, lanes], or [lanes, BLOCK_T] if turned: of every code of the tokens at `NAME_cell` where `present`, else 0.

    Of the type that the product is made in: bfloat16, or float32 if numbers are rounded to float16.
    """
    count, share = vectors.lanes // vectors.block_lanes, vectors.block_lanes
    token, block = ("[None, :]", "[:, None]") if turned else ("[:, None]", "[None, :]")
    mask = f"present{token}{f' & ({name}_block < {vectors.blocks}){block}' if vectors.blocks < count else ''}"
    lines = [
        f"{name}_block = tl.arange(0, {count})",
        *load(f"{name}_power", f"{name}_page + {name}_cell{token} + ({vectors.body} + {name}_block){block}", mask, "0"),
        # A power's exponent is that of the float: its bits are all there is to it.
        f"{name}_power = ({name}_power.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)"
        if kind == "bf16"
        else f"{name}_power = ({name}_power.to(tl.uint32) << 23).to(tl.float32, bitcast=True)",
    ]
    if share == 1:
        return lines
    shape, alike, lanes = (
        (f"[{count}, {share}, BLOCK_T]", "[:, None, :]", f"[{vectors.lanes}, BLOCK_T]")
        if turned
        else (f"[BLOCK_T, {count}, {share}]", "[:, :, None]", f"[BLOCK_T, {vectors.lanes}]")
    )
    return [*lines, f"{name}_power = tl.reshape(tl.broadcast_to({name}_power{alike}, {shape}), {lanes})"]


def number_lines(vectors: BlockVectors, part: Part, name: str, kind: str) -> Lines:
    """`NAME_0_p`, the numbers of a part in the 16-bit type `kind`."""
    number = f"{name}_0_{part.place}"
    if kind == "bf16":
        return [*code_lines(vectors, part, name, kind), f"{number} = {number} * {name}_power"]
    rounded = f"{number} = tl.maximum({number}.to(tl.float32) * {name}_power, -{LARGEST_HALF}).to(tl.float16)"
    return [*code_lines(vectors, part, name, kind), rounded]


def order_line(target: str, order: str, place: str, there: str) -> str:
    """`target`, the channel that stands at each `place` of the head's vectors, by the table at the pointer `order`.

    Tables come with an artifact: the remainder keeps a wrong one within the head.
    """
    mask = f", mask={there}, other=0" if there else ""
    return f"{target} = tl.load({order} + head * D + {place}{mask}).to(tl.int32) % D"


def places(vectors: BlockVectors, name: str, order: str) -> tuple[list[str], Lines]:
    """The channels of the lanes of each part, and the lines that read them, by `order`, where channels are sorted."""
    parts = list(vectors.all_parts())
    if not vectors.form.is_sorted:
        return [channel(part, name) for part in parts], []
    found = [f"{name}_channel_{part.place}" for part in parts]
    return found, [
        order_line(place, order, channel(part, name), within(vectors, part, name)) for place, part in zip(found, parts, strict=True)
    ]


def block_keys(vectors: BlockVectors, kind: str, order: str, name: str = "key", source: str = "keys") -> KeyTile:
    """Keys as blocks, for queries of the 16-bit type `kind`, which are read in the keys' order if they are sorted."""
    vectors = vectors.in_pairs
    found, read = places(vectors, name, order)
    query: Lines = [*lane_lines(vectors, name), *read]
    score = [*cell_lines(vectors, name, source), *power_lines(vectors, name, kind, turned=True), *item_lines(vectors, 0, name, turned=True)]
    for part, place in zip(vectors.all_parts(), found, strict=True):
        mask = mask_of("inside[:, None]", vectors, part, name, "[None, :]")
        query += load(f"query_0_{part.place}", f"query_at + {spread(place, '[None, :]')}", mask)
        score += [*number_lines(vectors, part, name, kind), score_line(part, name)]
    return KeyTile(query, score)


def spread(channels: str, axes: str) -> str:
    """Channels as they broadcast."""
    return f"({channels}){axes}" if " " in channels else f"{channels}{axes}"


def mask_of(first: str, vectors: BlockVectors, part: Part, name: str, axes: str) -> str:
    """The mask `first`, and which lanes of a part, spread over `axes`, are channels."""
    there = within(vectors, part, name)
    return f"{first} & ({there}){axes}" if there else first


def score_line(part: Part, name: str) -> str:
    """`score`, or what a part adds to it."""
    return f"score = tl.dot(query_0_{part.place}, {name}_0_{part.place}{', score' if part.place else ''})"


def mixed_vectors(vectors: BlockVectors) -> BlockVectors:
    """Values as they are read: two bytes at a time where sums keep their columns."""
    pairs = vectors.in_pairs
    return pairs if pairs.lanes >= LEAST_COLUMNS else vectors


def mix_line(part: Part, name: str) -> str:
    """What a part adds to its sums."""
    total = f"mixed_{part.place}"
    return f"{total} = tl.dot(rounded, {name}_0_{part.place}, {total} * decay[:, None])"


def block_values(vectors: BlockVectors, kind: str, order: str, name: str = "value", source: str = "values") -> ValueTile:
    """Values as blocks; sums of sorted ones are stored to the channels that they belong to."""
    vectors = mixed_vectors(vectors)
    parts = list(vectors.all_parts())
    zeros = lane_lines(vectors, name)
    zeros += [f"mixed_{part.place} = tl.zeros([BLOCK_M, {vectors.lanes}], dtype=tl.float32)" for part in parts]
    mix = [*cell_lines(vectors, name, source), *power_lines(vectors, name, kind, turned=False), *item_lines(vectors, 0, name, turned=False)]
    mix.append(f"rounded = weight.to({TRITON_TYPES[kind]})")
    for part in parts:
        mix += [*number_lines(vectors, part, name, kind), mix_line(part, name)]
    found, finish = places(vectors, name, order)
    sums = (Sum(f"mixed_{part.place}", place, within(vectors, part, name)) for part, place in zip(parts, found, strict=True))
    return ValueTile(zeros, mix, tuple(sums), finish)


def kept_keys(vectors: BlockVectors, kind: str, order: str, name: str = "key", source: str = "exact_keys") -> Lines:
    """`score` of keys that were never packed, part by part, as `block_keys` has read the queries."""
    vectors, lines = vectors.in_pairs, []
    for part, place in zip(vectors.all_parts(), places(vectors, name, order)[0], strict=True):
        lines += [*kept_lines(vectors, part, place, kind, name, source, turned=True), score_line(part, name)]
    return lines


def kept_values(vectors: BlockVectors, kind: str, order: str, name: str = "value", source: str = "exact_values") -> Lines:
    """Values that were never packed, added to the sums of `block_values`, once the channels of these are known."""
    vectors, lines = mixed_vectors(vectors), [f"rounded = weight.to({TRITON_TYPES[kind]})"]
    for part, place in zip(vectors.all_parts(), places(vectors, name, order)[0], strict=True):
        lines += [*kept_lines(vectors, part, place, kind, name, source, turned=False), mix_line(part, name)]
    return lines


def kept_lines(vectors: BlockVectors, part: Part, place: str, kind: str, name: str, source: str, *, turned: bool) -> Lines:
    """`NAME_0_p`, the channels `place` of the tokens at `slot`, D numbers each, where `present`."""
    token, lane = ("[None, :]", "[:, None]") if turned else ("[:, None]", "[None, :]")
    at = f"{source} + slot{token} * D + {spread(place, lane)}"
    return load(f"{name}_0_{part.place}", at, mask_of(f"present{token}", vectors, part, name, lane), suffix=f".to({TRITON_TYPES[kind]})")
