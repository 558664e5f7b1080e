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


def place_lines(part: Part, target: str, name: str, order: str, there: str) -> Lines:
    """`target`, the channel that stands at the place of each lane of a part, by the table at the pointer `order`.

    Tables come with an artifact: the remainder keeps a wrong one within the head.
    """
    mask = f", mask={there}, other=0" if there else ""
    return [f"{target} = tl.load({order} + head * D + {channel(part, name)}{mask}).to(tl.int32) % D"]


def block_keys(vectors: BlockVectors, kind: str, order: str, name: str = "key", source: str = "keys") -> KeyTile:
    """Keys as blocks, for queries of the 16-bit type `kind`, which are read in the keys' order if they are sorted."""
    vectors = vectors.in_pairs
    query: Lines = lane_lines(vectors, name)
    score = [*cell_lines(vectors, name, source), *power_lines(vectors, name, kind, turned=True), *item_lines(vectors, 0, name, turned=True)]
    for part in vectors.all_parts():
        there, place = within(vectors, part, name), f"({channel(part, name)})"
        if vectors.form.is_sorted:
            place = f"{name}_channel_{part.place}"
            query += place_lines(part, place, name, order, there)
        mask = f"inside[:, None]{f' & ({there})[None, :]' if there else ''}"
        query += load(f"query_0_{part.place}", f"query_at + {place}[None, :]", mask)
        before = ", score" if part.place else ""
        score += [*number_lines(vectors, part, name, kind), f"score = tl.dot(query_0_{part.place}, {name}_0_{part.place}{before})"]
    return KeyTile(query, score)


def block_values(vectors: BlockVectors, kind: str, order: str, name: str = "value", source: str = "values") -> ValueTile:
    """Values as blocks; sums of sorted ones are stored to the channels that they belong to."""
    if vectors.in_pairs.lanes >= LEAST_COLUMNS:
        vectors = vectors.in_pairs
    parts = list(vectors.all_parts())
    zeros = lane_lines(vectors, name)
    zeros += [f"mixed_{part.place} = tl.zeros([BLOCK_M, {vectors.lanes}], dtype=tl.float32)" for part in parts]
    mix = [*cell_lines(vectors, name, source), *power_lines(vectors, name, kind, turned=False), *item_lines(vectors, 0, name, turned=False)]
    mix.append(f"rounded = weight.to({TRITON_TYPES[kind]})")
    finish, sums = [], []
    for part in parts:
        total, there, place = f"mixed_{part.place}", within(vectors, part, name), channel(part, name)
        mix += [
            *number_lines(vectors, part, name, kind),
            f"{total} = tl.dot(rounded, {name}_0_{part.place}, {total} * decay[:, None])",
        ]
        if vectors.form.is_sorted:
            place = f"{name}_channel_{part.place}"
            finish += place_lines(part, place, name, order, there)
        sums.append(Sum(total, place, there))
    return ValueTile(zeros, mix, tuple(sums), finish)
