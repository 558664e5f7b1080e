"""What each architecture offers, and which tile a kernel takes for it; every number has its reason beside it."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import TargetError


@dataclass(frozen=True)
class Architecture:
    """A GPU generation: `sm90` has compute capability 9.0.

    Attributes:
        name: as in a target.
        capability: what Triton calls the architecture.
        multiprocessors: how many programs a grid needs to fill the largest part sold of it (A100, L40, H100, B200).
        shared_bytes: shared memory that one program can have.
        matrix: the instruction class of a large matrix product: `mma` (warp), `wgmma` (warp group), `tcgen05`.
        float8: the instruction class of a product of 8-bit floats; empty where there is none.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    matrix: str
    float8: str = ""


ARCHITECTURES = {
    "sm80": Architecture("sm80", 80, 108, 166_912, "mma"),
    "sm89": Architecture("sm89", 89, 128, 101_376, "mma", "qmma"),
    "sm90": Architecture("sm90", 90, 132, 232_448, "wgmma", "qgmma"),
    "sm100": Architecture("sm100", 100, 148, 232_448, "tcgen05", "utcqmma"),
}


def architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
        TargetError: for a name that is not in `ARCHITECTURES`.
    """
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise TargetError(f"architecture {name!r}: Triton kernels are built for {', '.join(ARCHITECTURES)}") from None


@dataclass(frozen=True)
class Tile:
    """The shape of one program of a linear: `rows` of the weight by `tokens` of the activation, `splits` of the columns."""

    rows: int
    tokens: int
    splits: int
    num_warps: int
    num_stages: int


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def split_columns(programs: int, columns: int, least: int, most: int, arch: Architecture) -> int:
    """Splits of K that bring `programs` up to one per multiprocessor, each at least `least` columns long."""
    return max(1, min(arch.multiprocessors // max(1, programs), columns // least, most))


def row_tile(rows: int, columns: int, arch: Architecture) -> Tile:
    """The tile of a matrix times one vector, which is bound by how many bytes are in flight.

    Eight rows give each thread two 16-byte loads; with too few programs for the multiprocessors four rows do. A split costs
    a second launch (about 2 µs), so it needs at least 1024 columns to itself.
    """
    height = 8 if rows >= 16 * arch.multiprocessors else 4
    splits = split_columns(-(-rows // height), columns, 1024, 8, arch)
    return Tile(height, 1, splits, num_warps=4, num_stages=1)


def matrix_tile(rows: int, columns: int, bucket: str, awkward: bool, arch: Architecture) -> Tile:
    """The tile of a matrix product on tensor cores, the weight's rows on the M side of the instruction.

    2 to 63 tokens: 64 rows are the least a warp group multiplies; 32 tokens cost little more than 16 and halve the passes over
    the weight for a batch of 32. A split has at least 256 columns: four steps (two of 4-bit codes) to overlap loads with.
    From 64 tokens: 128 rows; 128 tokens where accumulators leave room (wgmma), 64 where operands need registers too (mma: 128
    spilled). The number of tokens is not known here: splits are made for 256 of them, and have at least 512 columns.
    `awkward`: several scales in a step, or columns of x that no wide load reaches, cost so many registers (on sm80 it spilled)
    that a quarter of the tile is what fits.
    """
    if bucket == "m2-63":
        splits = split_columns(-(-rows // 64), columns, 256, 16, arch)
        return Tile(64, 32, splits, num_warps=8 if awkward else 4, num_stages=3)
    height = 64 if awkward else 128
    tokens = 32 if awkward else 64 if arch.matrix == "mma" else 128
    splits = split_columns(-(-rows // height) * (256 // tokens), columns, 512, 4, arch)
    return Tile(height, tokens, splits, num_warps=8, num_stages=3)


def attention_keys(head_dim: int, arch: Architecture) -> int:
    """Keys per step of attention: 64, or 32 where a wide head would not fit into registers (mma) or shared memory."""
    width = power_of_two(head_dim)
    return 32 if width > 128 or (width > 64 and arch.matrix == "mma") else 64


def attention_warps(head_dim: int, arch: Architecture) -> int:
    """Warps of prefill attention: 8 for heads over 128, whose sums would not fit into 4; tcgen05 keeps sums outside the registers."""
    return 8 if power_of_two(head_dim) > 128 and arch.matrix != "tcgen05" else 4


def decode_splits(key_heads: int, arch: Architecture) -> int:
    """Shares of the length in flash-decode at a batch of one: two programs per multiprocessor, a power of two from 4 to 32."""
    return min(32, max(4, power_of_two(2 * arch.multiprocessors // key_heads + 1) // 2))


def row_warps(columns: int) -> int:
    """Warps of a program that holds one row in registers: up to 16 elements a thread, then more warps."""
    return min(16, max(1, power_of_two(columns) // 512))
