"""What attention is put together from: how a tile of cached keys becomes scores, and how a tile of values is mixed.

The loop of `attention.py` leaves these variables to the lines of a tile: `slot`, the number [BLOCK_T] of the place of a token in all pages;
`present`, whether there is a token; `query_at`, the pointers [BLOCK_M, 1] to the lines' queries; `inside`, whether there is a line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.codegen.triton.source import Lines, load


@dataclass(frozen=True)
class KeyTile:
    """Keys in some form.

    Attributes:
        query: before the loop, once: what is read of the queries.
        score: in the loop: leave `score` [BLOCK_M, BLOCK_T], float32, the products of queries and keys.
    """

    query: Lines
    score: Lines


@dataclass(frozen=True)
class Sum:
    """Weighted values that a loop adds up, float32 [BLOCK_M, channels].

    Attributes:
        name: its variable.
        channel: the channel of each column.
        within: which columns are channels; empty where all are.
    """

    name: str
    channel: str
    within: str = ""

    @property
    def columns(self) -> str:
        """The channels as they broadcast over lines."""
        return f"({self.channel})[None, :]" if " " in self.channel else f"{self.channel}[None, :]"

    def mask(self, inside: str) -> str:
        """The places [BLOCK_M, channels] that are there, given the variable that says which lines are."""
        return f"{inside}[:, None] & ({self.within})[None, :]" if self.within else f"{inside}[:, None]"


@dataclass(frozen=True)
class ValueTile:
    """Values in some form.

    Attributes:
        zeros: before the loop: the sums.
        mix: in the loop: each sum times `decay` [BLOCK_M], plus `weight` [BLOCK_M, BLOCK_T], float32, times the values.
        finish: after the loop: what the sums lack.
        sums: the sums, each for channels of its own.
    """

    zeros: Lines
    mix: Lines
    sums: tuple[Sum, ...]
    finish: Lines


@dataclass(frozen=True)
class Tiles:
    """Keys and values of a cache.

    Attributes:
        keys: how keys are read.
        values: how values are read.
        step: tokens of a step, BLOCK_T.
        channels: what comes before both.
        together: tokens that lie together; a page holds a multiple of them.
        lines: lines of a program where there are many, BLOCK_M.
    """

    keys: KeyTile
    values: ValueTile
    step: int
    channels: Lines = field(default_factory=list)
    together: int = 1
    lines: int = 64


def plain_tiles(kind: str, step: int, names: tuple[str, str] = ("keys", "values"), suffix: str = "") -> Tiles:
    """Keys and values of 16 bits, D numbers a slot; `kind` is Triton's name of their type, which `suffix` turns them into if need be."""
    keys_from, values_from = names
    keys = KeyTile(
        query=["query = tl.load(query_at + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0)"],
        score=[
            *load("key_tile", f"{keys_from} + slot[None, :] * D + dim[:, None]", "present[None, :] & (dim < D)[:, None]", suffix=suffix),
            "score = tl.dot(query, key_tile)",
        ],
    )
    values = ValueTile(
        zeros=["mixed = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)"],
        mix=[
            *load(
                "value_tile", f"{values_from} + slot[:, None] * D + dim[None, :]", "present[:, None] & (dim < D)[None, :]", suffix=suffix
            ),
            f"mixed = tl.dot(weight.to({kind}), value_tile, mixed * decay[:, None])",
        ],
        sums=(Sum("mixed", "dim", "dim < D"),),
        finish=[],
    )
    return Tiles(keys, values, step, ["dim = tl.arange(0, BLOCK_D)"])
