"""Vectors that a cache packs token by token (`qcompile/quant/vector_format.py`), as attention reads them.

A *part* of a group is what one place of its items holds, which are bytes or pairs of bytes: every channel of 8-bit codes, every second or
fourth of 4-bit ones, every fourth of 2-bit ones. Each part is multiplied by itself, with queries or into sums that hold the same channels,
so that nothing moves between lanes. Scales belong to a token and a group: they multiply scores and weights, never a tile of codes.

Codes are centred, -2^(b-1) and up, and `middle` = least + 2^(b-1) · scale stands for the least value: x = middle + code · scale. So a
weight's rounding to 16 bits costs what it costs with symmetric codes.

The walk over a cache leaves `first_slot`, a number of a place in all pages, and `row` [BLOCK_T], how far from there a token's place is; and
`present`, which tokens are there. Variables of a group g and a part p of it are called `NAME_scale_g`, `NAME_middle_g`, `NAME_g_p`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qcompile.codegen.triton.cache_tiles import KeyTile, Sum, ValueTile
from qcompile.codegen.triton.contract import TRITON_TYPES
from qcompile.codegen.triton.elements import element_float32
from qcompile.codegen.triton.source import Lines, load
from qcompile.codegen.triton.tiles import power_of_two
from qcompile.errors import FormatError
from qcompile.quant.element import FP8
from qcompile.quant.vector_format import VectorFormat, vector_format

LEAST_LANES = 16
"""The narrowest side of a matrix product."""
MOST_PARTS = 16
"""Products of a step: each takes registers of its own."""
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
class PackedVectors:
    """Vectors of `size` numbers in a form with scales per token, whose codes are loaded `item` bytes at a time."""

    form: VectorFormat
    size: int
    item: int = 1

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.form.element.bits

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def per_item(self) -> int:
        """Codes in an item."""
        return self.per_byte * self.item

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return self.form.groups(self.size)

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
    def in_pairs(self) -> PackedVectors:
        """Codes of 4 bits two bytes at a time, as wide as the numbers they become, where addresses allow it and no lane is wasted."""
        fits = self.even and self.group_bytes % 2 == 0 and self.group_bytes >= 2 * LEAST_LANES
        return replace(self, item=2) if self.bits == 4 and fits else self

    @property
    def body(self) -> int:
        """Bytes of a token's codes: scales begin behind them."""
        return -(-self.size * self.bits // 8)

    @property
    def width(self) -> int:
        """W, bytes of a token."""
        return self.form.width(self.size)

    @property
    def even(self) -> bool:
        """Whether every scale lies at an even address."""
        return self.body % 2 == 0 and self.width % 2 == 0

    @property
    def has_middle(self) -> bool:
        """Whether there are least values."""
        return not self.form.symmetric

    def parts(self, group: int) -> list[Part]:
        """The parts of a group."""
        step = self.per_item
        return [Part(group, place, group * self.group + place, step, -(-(self.group - place) // step)) for place in range(step)]

    def all_parts(self) -> Iterator[Part]:
        """The parts of every group."""
        for group in range(self.groups):
            yield from self.parts(group)


def packed_vectors(form: str, size: int) -> PackedVectors:
    """How vectors of `size` numbers in the form called `form` are read."""
    read = vector_format(form)
    assert isinstance(read, VectorFormat)
    return PackedVectors(read, size)


def refuses_packed(form: object, size: int) -> str | None:
    """Why kernels do not read vectors of `size` numbers in this form, or None."""
    try:
        read = vector_format(str(form))
    except FormatError as error:
        return str(error)
    if not isinstance(read, VectorFormat):
        return f"{form}: expected a form whose scales stand beside its codes"
    vectors = PackedVectors(read, size)
    if vectors.form.tokens > 1:
        return f"{form}: expected scales per token, got {vectors.form.tokens} tokens encoded together"
    if vectors.bits not in WHOLE_BITS:
        return f"{form}: expected codes of 2, 4 or 8 bits"
    if vectors.groups > 1 and vectors.group % vectors.per_byte:
        return f"{form}: expected groups of whole bytes, a multiple of {vectors.per_byte} channels"
    count = vectors.groups * vectors.per_byte
    return f"{form}: expected at most {MOST_PARTS // vectors.per_byte} groups in {size} numbers" if count > MOST_PARTS else None


def lane_lines(vectors: PackedVectors, name: str) -> Lines:
    """`NAME_lane`: the items of a group."""
    return [f"{name}_lane = tl.arange(0, {vectors.lanes})"]


def channel(part: Part, name: str) -> str:
    """The channel of each lane of a part, given `NAME_lane`."""
    times = f"{part.step} * " if part.step > 1 else ""
    return f"{times}{name}_lane{f' + {part.first}' if part.first else ''}"


def within(vectors: PackedVectors, part: Part, name: str) -> str:
    """Which lanes of a part are channels; empty where all are."""
    return "" if part.count == vectors.lanes else f"{name}_lane < {part.count}"


def cell_lines(vectors: PackedVectors, name: str, source: str) -> Lines:
    """`NAME_page`, a pointer, and `NAME_cell`, the bytes [BLOCK_T] from there to each token."""
    return [f"{name}_page = {source} + first_slot * {vectors.width}", f"{name}_cell = row * {vectors.width}"]


def item_lines(vectors: PackedVectors, group: int, name: str, *, turned: bool) -> Lines:
    """`NAME_items_g`, [BLOCK_T, lanes], or [lanes, BLOCK_T] if turned, of the tokens at `NAME_cell` where `present`."""
    token, lane = ("[None, :]", "[:, None]") if turned else ("[:, None]", "[None, :]")
    item = f"({name}_lane + {group * vectors.group_items})" if group else f"{name}_lane"
    mask = f"present{token}"
    if vectors.group_items < vectors.lanes:
        mask += f" & ({name}_lane < {vectors.group_items}){lane}"
    if vectors.item == 1:
        return load(f"{name}_items_{group}", f"{name}_page + {name}_cell{token} + {item}{lane}", mask, "0")
    return load(f"{name}_items_{group}", f"({name}_page + {name}_cell{token}).to(tl.pointer_type(tl.uint16)) + {item}{lane}", mask, "0")


def number_lines(vectors: PackedVectors, part: Part, name: str, kind: str) -> Lines:
    """`NAME_g_p`, the centred codes of a part as the 16-bit type `kind` (bf16, fp16), which holds each of them exactly."""
    packed = f"{name}_items_{part.group}"
    mask = (1 << vectors.bits) - 1
    code = packed if vectors.bits == 8 else f"({packed} & {mask})" if part.place == 0 else f"({packed} >> {part.place * vectors.bits})"
    if 0 < part.place < vectors.per_item - 1:
        code = f"({code} & {mask})"
    return [f"{name}_{part.group}_{part.place} = {numbers(vectors, code, kind)}"]


def numbers(vectors: PackedVectors, code: str, kind: str) -> str:
    """The number of a code, an unsigned tensor, in the 16-bit type `kind`: exact, and no conversion instruction where bits will do."""
    half, tl_kind = 1 << (vectors.bits - 1), TRITON_TYPES[kind]
    if vectors.form.element == FP8:
        if kind == "fp16":
            return f"((({code}.to(tl.uint16) & 127) << 7) | (({code}.to(tl.uint16) & 128) << 8)).to(tl.float16, bitcast=True) * 256.0"
        return f"({element_float32('fp8', f'{code}.to(tl.uint32)')}).to({tl_kind})"
    if vectors.bits <= 4 and kind == "bf16":
        return f"({code}.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - {128.0 + half}"
    if kind == "fp16":
        return f"({code}.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - {1024.0 + half}"
    return f"(({code}.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - {float((1 << 23) + half)}).to({tl_kind})"


def half_lines(vectors: PackedVectors, targets: list[str], name: str) -> Lines:
    """`targets`, float32 [BLOCK_T]: the float16 numbers behind the codes, in order; two in a load where addresses allow it."""
    start = f"{name}_page + {name}_cell + "
    if vectors.body % 4 == 0 and vectors.width % 4 == 0 and len(targets) % 2 == 0:
        return [
            line
            for place in range(0, len(targets), 2)
            for line in pair_lines(targets[place : place + 2], f"{start}{vectors.body + 2 * place}")
        ]
    lines: Lines = []
    for place, target in enumerate(targets):
        at = vectors.body + 2 * place
        if vectors.even:
            lines += load(target, f"({start}{at}).to(tl.pointer_type(tl.float16))", "present", suffix=".to(tl.float32)")
            continue
        lines += [
            *load("low", f"{start}{at}", "present", "0", ".to(tl.uint16)"),
            *load("high", f"{start}{at + 1}", "present", "0", ".to(tl.uint16)"),
            f"{target} = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)",
        ]
    return lines


def pair_lines(targets: list[str], at: str) -> Lines:
    """Two float16 numbers in one load, which is wide enough to be on its way while the step before is computed."""
    return [
        *load("pair", f"({at}).to(tl.pointer_type(tl.uint32))", "present", "0"),
        f"{targets[0]} = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)",
        f"{targets[1]} = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)",
    ]


def scale_lines(vectors: PackedVectors, name: str) -> Lines:
    """`NAME_scale_g` and, where there are least values, `NAME_middle_g`, float32 [BLOCK_T], of the tokens at `NAME_cell`."""
    kinds = ("scale", "middle") if vectors.has_middle else ("scale",)
    lines = half_lines(vectors, [f"{name}_{kind}_{group}" for kind in kinds for group in range(vectors.groups)], name)
    if vectors.has_middle:
        half = float(1 << (vectors.bits - 1))
        lines += [f"{name}_middle_{group} += {half} * {name}_scale_{group}" for group in range(vectors.groups)]
    return lines


def packed_keys(vectors: PackedVectors, kind: str, name: str = "key", source: str = "keys") -> KeyTile:
    """Keys that are packed, for queries of the 16-bit type `kind`: score = scale · (query · codes) + middle · Σ query, group by group."""
    vectors = vectors.in_pairs
    query: Lines = lane_lines(vectors, name)
    for group in range(vectors.groups):
        for part in vectors.parts(group):
            there = within(vectors, part, name)
            mask = f"inside[:, None]{f' & ({there})[None, :]' if there else ''}"
            query += load(f"query_{group}_{part.place}", f"query_at + ({channel(part, name)})[None, :]", mask)
        if vectors.has_middle:
            whole = " + ".join(f"query_{group}_{part.place}.to(tl.float32)" for part in vectors.parts(group))
            query.append(f"query_sum_{group} = tl.sum({whole}, axis=1)")
    return KeyTile(query, [*cell_lines(vectors, name, source), *scale_lines(vectors, name), *_scores(vectors, kind, name)])


def _scores(vectors: PackedVectors, kind: str, name: str) -> Lines:
    lines: Lines = []
    for group in range(vectors.groups):
        lines += item_lines(vectors, group, name, turned=True)
        for part in vectors.parts(group):
            lines += number_lines(vectors, part, name, kind)
            before = ", product" if part.place else ""
            lines.append(f"product = tl.dot(query_{group}_{part.place}, {name}_{group}_{part.place}{before})")
        lines.append(f"score {'+' if group else ''}= product * {name}_scale_{group}[None, :]")
        if vectors.has_middle:
            lines.append(f"score += query_sum_{group}[:, None] * {name}_middle_{group}[None, :]")
    return lines


def packed_values(vectors: PackedVectors, kind: str, name: str = "value", source: str = "values") -> ValueTile:
    """Values that are packed; weights times scales are rounded to the 16-bit type `kind`, middles are added up apart in float32.

    float16 would lose small weights times small scales: there the greatest scale of a tile comes after the product.
    """
    parts = list(vectors.all_parts())
    zeros = lane_lines(vectors, name)
    zeros += [f"mixed_{part.group}_{part.place} = tl.zeros([BLOCK_M, {vectors.lanes}], dtype=tl.float32)" for part in parts]
    finish: Lines = []
    if vectors.has_middle:
        zeros += [f"lift_{group} = tl.zeros([BLOCK_M], dtype=tl.float32)" for group in range(vectors.groups)]
        finish = [f"mixed_{part.group}_{part.place} += lift_{part.group}[:, None]" for part in parts]
    mix = [*cell_lines(vectors, name, source), *scale_lines(vectors, name)]
    for group in range(vectors.groups):
        mix += _mix_group(vectors, group, kind, name)
    sums = tuple(Sum(f"mixed_{part.group}_{part.place}", channel(part, name), within(vectors, part, name)) for part in parts)
    return ValueTile(zeros, mix, sums, finish)


def _mix_group(vectors: PackedVectors, group: int, kind: str, name: str) -> Lines:
    scale, product = f"{name}_scale_{group}", "tl.dot(scaled, {0}, {1} * decay[:, None])"
    lines = item_lines(vectors, group, name, turned=False)
    if kind == "fp16":
        lines += [f"top = tl.maximum(tl.max({scale}, axis=0), {2.0**-14})", f"{scale} = {scale} / top"]
        product = "{1} * decay[:, None] + tl.dot(scaled, {0}) * top"
    lines.append(f"scaled = (weight * {scale}[None, :]).to({TRITON_TYPES[kind]})")
    for part in vectors.parts(group):
        tile, total = f"{name}_{group}_{part.place}", f"mixed_{group}_{part.place}"
        lines += [*number_lines(vectors, part, name, kind), f"{total} = {product.format(tile, total)}"]
    if vectors.has_middle:
        lines.append(f"lift_{group} = lift_{group} * decay + tl.sum(weight * {name}_middle_{group}[None, :], axis=1)")
    return lines
