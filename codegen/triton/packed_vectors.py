"""Vectors that a cache packs token by token with scales (`qcompile/quant/vector_format.py`), as attention reads them.

Scales belong to a token and a group: they multiply scores and weights, never a tile of codes.

Codes are centred, -2^(b-1) and up, and `middle` = least + 2^(b-1) · scale stands for the least value: x = middle + code · scale. So a
weight's rounding to 16 bits costs what it costs with symmetric codes.

Variables of a group g are called `NAME_scale_g`, `NAME_middle_g`; the others are those of `packed_codes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.triton.cache_tiles import KeyTile, Sum, ValueTile
from qcompile.codegen.triton.contract import TRITON_TYPES
from qcompile.codegen.triton.packed_codes import WHOLE_BITS, PackedCodes, cell_lines, channel, item_lines, lane_lines, number_lines, within
from qcompile.codegen.triton.source import Lines, load
from qcompile.quant.element import FP8
from qcompile.quant.vector_format import VectorFormat

MOST_PARTS = 16
"""Products of a step: each takes registers of its own."""


@dataclass(frozen=True)
class PackedVectors(PackedCodes):
    """Vectors in a form with scales per token."""

    form: VectorFormat

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.form.element.bits

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return self.form.groups(self.size)

    @property
    def share(self) -> int:
        """Numbers of a group share a scale."""
        return self.group

    @property
    def is_float(self) -> bool:
        """Whether codes are floats of 8 bits."""
        return self.form.element == FP8

    @property
    def has_middle(self) -> bool:
        """Whether there are least values."""
        return not self.form.symmetric


def refuses_vectors(form: VectorFormat, size: int) -> str | None:
    """Why kernels do not read vectors of `size` numbers in this form, or None."""
    vectors = PackedVectors(form, size)
    if vectors.form.tokens > 1:
        return f"expected scales per token, got {vectors.form.tokens} tokens encoded together"
    if vectors.bits not in WHOLE_BITS:
        return "expected codes of 2, 4 or 8 bits"
    if vectors.groups > 1 and vectors.group % vectors.per_byte:
        return f"expected groups of whole bytes, a multiple of {vectors.per_byte} channels"
    count = vectors.groups * vectors.per_byte
    return f"expected at most {MOST_PARTS // vectors.per_byte} groups in {size} numbers" if count > MOST_PARTS else None


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
