"""Hadamard rotations of a row held in registers: `M ⊗ S_k` by a small matrix product and k rounds of butterflies.

A row of K columns is a number of blocks of `size` = m·2^k channels. Column `block·size + a·2^k + b` becomes place (block, a, b) of a
cube whose sides are padded to powers of two; M mixes along a, the butterflies run along b.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.codegen.triton.source import Lines, function, load, loop
from qcompile.codegen.triton.tiles import power_of_two
from qcompile.ir.lowered import KernelSpec

LONGEST_ROW = 1 << 15
"""Numbers that a program of 16 warps holds in registers: 64 a thread."""
LARGEST_ORDER = 256
LONGEST_MIXED_ROW = 1 << 14
"""Beside a matrix: twice as many spilled."""
LEAST_WIDTH = 16
"""The narrowest side of a matrix product."""


@dataclass(frozen=True)
class Row:
    """A row of `columns` columns in blocks of `size` = `order`·2^k; `size` 0 means that nothing is rotated."""

    columns: int
    size: int
    order: int

    @property
    def twos(self) -> int:
        """2^k, the length of a run that the butterflies transform; 1 where nothing is rotated."""
        return self.size // self.order if self.size else 1

    @property
    def bits(self) -> int:
        """The exponent k of the block size."""
        return self.twos.bit_length() - 1

    @property
    def mixed(self) -> bool:
        """Whether a matrix comes before the butterflies."""
        return self.size > 0 and self.order > 1

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.columns // self.size if self.size else 1

    @property
    def side(self) -> int:
        """m, padded."""
        return max(LEAST_WIDTH, power_of_two(self.order))

    @property
    def width(self) -> int:
        """Places beside each other in the product with M: all blocks of a row and their 2^k numbers, padded."""
        return max(LEAST_WIDTH, power_of_two(self.blocks) * self.twos)

    @property
    def chunk(self) -> int:
        """Columns of M in a step of its product: so few, where M is large, that neither the step nor the row spills."""
        return min(32, self.side) if self.side <= 64 else 16

    @property
    def held(self) -> int:
        """Places of the whole row, padded."""
        return self.side * self.width if self.mixed else power_of_two(self.columns)

    @property
    def scattered(self) -> bool:
        """Whether padding lies between blocks, so that a place is not its column."""
        return self.mixed and self.width > self.twos

    @property
    def run(self) -> int:
        """Consecutive places that hold consecutive columns."""
        return self.side * self.twos if self.scattered else self.held


def row_of(spec: KernelSpec) -> Row:
    """The row of a specification with size K, option `hadamard_size`, and size M where there is a matrix."""
    return Row(spec.size("K"), int(spec.option("hadamard_size", 0)), dict(spec.sizes).get("M", 1))


def refuses_row(spec: KernelSpec) -> str | None:
    """Why a row cannot be held and rotated by one program."""
    size, order = int(spec.option("hadamard_size", 0)), dict(spec.sizes).get("M", 1)
    if size < 0 or (size and spec.size("K") % size):
        return f"hadamard_size={size}: expected a divisor of K={spec.size('K')}"
    if order > LARGEST_ORDER:
        return f"M={order}: expected a matrix of order {LARGEST_ORDER} at most"
    if size and (size % order or (size // order) & (size // order - 1)):
        return f"hadamard_size={size}: expected M={order} times a power of two"
    if (order > 1) != (spec.format("matrix") is not None):
        return f"matrix is {spec.format('matrix')}: expected {'one' if order > 1 else 'none'} for M={order}"
    held, longest = row_of(spec).held, LONGEST_MIXED_ROW if order > 1 else LONGEST_ROW
    if held > longest:
        return f"K={spec.size('K')}: expected at most {longest} numbers (with padding, {held}), a program holds the whole row"
    return None


def row_constants(row: Row) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers that the lines of this file refer to."""
    values: dict[str, tuple[int | float, str]] = {"K": (row.columns, "columns"), "HELD": (row.held, "places of a row")}
    if row.size:
        values |= {"BITS": (row.bits, "rounds of butterflies"), "NORM": (row.twos**-0.5, "1 / sqrt(2^BITS)")}
    if row.mixed:
        values |= {
            "SIZE": (row.size, "channels of a block"),
            "BLOCKS": (row.blocks, "blocks in a row"),
            "ORDER": (row.order, "order of the matrix"),
            "SIDE": (row.side, "the order, padded"),
            "TWOS": (row.twos, "2^BITS"),
            "WIDTH": (row.width, "places of every block's TWOS numbers, padded"),
            "CHUNK": (row.chunk, "columns of the matrix in a step"),
            "PLACES": (power_of_two(row.columns), "columns, padded"),
        }
    return values


def place_lines(row: Row) -> Lines:
    """`column` and `inside` of the places [HELD] of a row."""
    if not row.scattered:
        return ["column = tl.arange(0, HELD)", "inside = column < K"]
    return [
        "place = tl.arange(0, HELD)",
        "within = place % (SIDE * TWOS)",
        "block = place // (SIDE * TWOS)",
        "column = block * SIZE + within",
        "inside = (within < SIZE) & (block < BLOCKS)",
    ]


@dataclass(frozen=True)
class Source:
    """Where a row's numbers come from, as lines over the places `column`, `inside`, whatever the shape of those.

    Attributes:
        load: leave `wide`, float32.
        prepare: what needs the whole row (a sum, a store); run once, leaves `factor`.
        finish: change each number of `wide` by `factor`.
        pointers: what `load` and `prepare` read and write.
    """

    load: Lines
    prepare: Lines = field(default_factory=list)
    finish: Lines = field(default_factory=list)
    pointers: tuple[str, ...] = ()


def rotate_lines(row: Row, source: Source, kind: str) -> Lines:
    """`wide` [HELD], rotated, with its `column` and `inside`.

    Before a matrix the row is loaded chunk by chunk, since registers have no slices.
    `kind` is Triton's name of the 16-bit type in which the model computes.
    """
    turn = ["wide = butterflies(wide, HELD, BITS) * NORM"] if row.bits else []
    if not row.mixed:
        return [*place_lines(row), *source.load, *source.prepare, *source.finish, *turn]
    step = [
        "channel = chunk * CHUNK + tl.arange(0, CHUNK)",
        "column = channel[:, None] * TWOS + (place // TWOS * SIZE + place % TWOS)[None, :]",
        "inside = (channel < ORDER)[:, None] & (place // TWOS < BLOCKS)[None, :]",
        *source.load,
        *source.finish,
        *load("mixer", "matrix + target[:, None] * ORDER + channel[None, :]", "(target < ORDER)[:, None] & (channel < ORDER)[None, :]"),
        # Two 16-bit numbers hold an entry to 2^-16 of it; the row is rounded to the model's type, as the operator's definition has it.
        f"high = mixer.to({kind})",
        f"narrow = wide.to({kind})",
        "mixed = tl.dot(high, narrow, mixed)",
        f"mixed = tl.dot((mixer - high.to(tl.float32)).to({kind}), narrow, mixed)",
    ]
    natural = "tl.permute(tl.reshape(mixed, [SIDE, WIDTH // TWOS, TWOS]), [1, 0, 2])" if row.scattered else "mixed"
    return [
        *([f"factor = read_row({', '.join(source.pointers)}, row, K, PLACES)"] if source.prepare else []),
        "place = tl.arange(0, WIDTH)",
        "target = tl.arange(0, SIDE)",
        "mixed = tl.zeros([SIDE, WIDTH], dtype=tl.float32)",
        *loop("for chunk in range(SIDE // CHUNK)", step),
        f"wide = tl.reshape({natural}, [HELD])",
        *turn,
        *place_lines(row),
    ]


def helpers(row: Row, source: Source) -> list[Lines]:
    """The functions that `rotate_lines` calls, where it does."""
    return [*([butterflies()] if row.bits else []), *([read_row(source)] if row.mixed and source.prepare else [])]


def read_row(source: Source) -> Lines:
    """What is done with a whole row before its chunks are loaded; a function of its own, for its places have another shape."""
    body = ["column = tl.arange(0, PLACES)", "inside = column < K", *source.load, *source.prepare, "return factor"]
    parameters = [*source.pointers, "row", "K: tl.constexpr", "PLACES: tl.constexpr"]
    return function("read_row", parameters, "What each number of the row is multiplied by.", body)


def butterflies() -> Lines:
    """Sylvester's transform in registers."""
    body = [
        "for _ in tl.static_range(BITS):",
        "    left, right = tl.split(tl.reshape(values, [HELD >> BITS, 1 << (BITS - 1), 2]))",
        "    values = tl.reshape(tl.permute(tl.join(left + right, left - right), [0, 2, 1]), [HELD])",
        "return values",
    ]
    doc = "Sylvester's transform of each run of 2^BITS: a round adds and subtracts neighbours and moves their bit to the top of the index."
    return function("butterflies", ["values", "HELD: tl.constexpr", "BITS: tl.constexpr"], doc, body)
