"""Layouts of packed weights that kernels prefer to the artifact's; applied once at load, by name.

The artifact stores codes uint8 [N, ceil(K·b/8)], low bits first (`qcompile.quant.reference.pack`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from qcompile.errors import ArtifactError
from qcompile.quant.packing import unpack

HALF = 64
"""Columns that lie side by side in the nibbles of one side under `split-half`."""
QUARTER = 32
"""Columns that lie side by side in one pair of bits under `split-quarter`."""
THREE_BIT_BLOCK = QUARTER + QUARTER // 2
"""Bytes that 128 columns of 3 bits take under `split-planes`."""


def split_half_bytes(columns: int) -> int:
    """Bytes of a `split-half` row that holds `columns` columns: whole blocks of 64 bytes."""
    return -(-columns // (2 * HALF)) * HALF


def split_half(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [N, ceil(K/2)] to [N, ceil(K/128)·64]: byte j of a block holds column j low and column j + 64 high.

    Both nibbles of consecutive bytes are then consecutive columns, so no kernel has to interleave; rows begin at 64 bytes. The tail is 0.
    """
    rows, stored = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -stored % HALF))
    columns = torch.stack((padded & 15, padded >> 4), dim=-1).view(rows, -1, 2, HALF)
    return (columns[:, :, 0] | (columns[:, :, 1] << 4)).reshape(rows, -1)


def split_quarter(codes: Tensor) -> Tensor:
    """2-bit codes uint8 [N, ceil(K/4)] to [N, ceil(K/128)·32]: byte j of a block holds columns j, j + 32, j + 64, j + 96."""
    return _quarters(unpack(codes, 2, codes.shape[1] * 4))


def split_planes(codes: Tensor) -> Tensor:
    """3-bit codes uint8 [N, ceil(3K/8)] to [N, ceil(K/128)·48]: of each block the low two bits as by `split_quarter`, then the third bits.

    Byte j of these 16 holds columns j, j + 16 … j + 112, low bits first.
    """
    columns = unpack(codes, 3, codes.shape[1] * 8 // 3)
    low = _quarters(columns & 3).view(len(codes), -1, QUARTER)
    third = _blocks(columns >> 2, QUARTER // 2)
    shifts = torch.arange(third.shape[2], dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    return torch.cat((low, (third << shifts).sum(2).to(torch.uint8)), dim=-1).flatten(1)


def _blocks(columns: Tensor, run: int) -> Tensor:
    """[N, K] as [N, ceil(K/128), 128 / run, run], the tail 0."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % (2 * HALF))).view(len(columns), -1, 2 * HALF // run, run)


def _quarters(columns: Tensor) -> Tensor:
    parts = _blocks(columns, QUARTER)
    return (parts[:, :, 0] | (parts[:, :, 1] << 2) | (parts[:, :, 2] << 4) | (parts[:, :, 3] << 6)).flatten(1)


def split_half_signed(codes: Tensor) -> Tensor:
    """`split_half` of 4-bit codes as two's complement of `code - 8`: a nibble moved to the top of a byte is 16 times its number.

    What fills the tail is the number 0 (for an even number of columns).
    """
    return split_half(codes ^ 0x88)


def signed(codes: Tensor) -> Tensor:
    """8-bit codes uint8 [N, K] as the int8 numbers `code - 128` that integer tensor cores multiply."""
    return (codes ^ 0x80).view(torch.int8)


def float8(codes: Tensor) -> Tensor:
    """The bit patterns of float8 (e4m3) [N, K], stored as uint8, under their own type."""
    return codes.view(torch.float8_e4m3fn)


def as_bytes(stored: Tensor) -> Tensor:
    """The bit patterns of an 8-bit type."""
    return stored.view(torch.uint8)


TILE = 16
"""Rows that lie side by side under `tiles`: what a vector of a CPU holds."""


def tiles(stored: Tensor) -> Tensor:
    """Rows [N, C] of anything to [ceil(N/16), C, 16]: the same column of 16 rows is one vector. Rows that fill up are 0."""
    padded = torch.nn.functional.pad(stored, (0, 0, 0, -len(stored) % TILE))
    return padded.view(-1, TILE, stored.shape[1]).transpose(1, 2).contiguous()


def tiles_pairs(stored: Tensor) -> Tensor:
    """Numbers of 16 bits [N, K] to int32 [ceil(N/16), ceil(K/2), 16]: a word holds 2 columns of a row, low first; what fills up is 0."""
    return tiles(torch.nn.functional.pad(stored, (0, stored.shape[1] % 2)).contiguous().view(torch.int32))


def tiles_planes8(codes: Tensor) -> Tensor:
    """8-bit codes uint8 [N, K] as they are to int32 [ceil(N/16), ceil(K/4), 16]: a word holds 4 columns of a row, unsigned."""
    return tiles(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).view(torch.int32))


def tiles_planes4(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [N, ceil(K/2)] to int32 [ceil(N/16), ceil(K/8), 16]: byte i of a word holds columns i (low) and i + 4 of its 8.

    Masked, a word is then four columns beside each other, one a byte, as activations of 8 bits lie in memory.
    """
    packed = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).view(len(codes), -1, 2, 2)
    low, high = packed[:, :, 0], packed[:, :, 1]
    even, odd = (low & 15) | (high << 4), (low >> 4) | (high & 0xF0)
    return tiles(torch.stack((even, odd), dim=-1).flatten(1).view(torch.int32))


def tiles_planes2(codes: Tensor) -> Tensor:
    """2-bit codes uint8 [N, ceil(K/4)] to int32 [ceil(N/16), ceil(K/16), 16]: byte i of a word holds columns i, i + 4, i + 8, i + 12."""
    columns = unpack(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)), 2, -(-codes.shape[1] // 4) * 16)
    parts = columns.view(len(codes), -1, 4, 4)
    words = parts[:, :, 0] | (parts[:, :, 1] << 2) | (parts[:, :, 2] << 4) | (parts[:, :, 3] << 6)
    return tiles(words.flatten(1).view(torch.int32))


def tiles_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes of 3, 5, 6 or 7 bits uint8 [N, ceil(K·b/8)] to int32 [ceil(N/16), C, 16]: planes of 4, 2 and 1 bits, low bits in the widest.

    A block of 32 columns (16 of 6-bit codes) takes the words of its planes one after the other, the widest first. In a plane of v bits word
    w has columns 32/v·w and so on, dealt out as by `tiles_planes4`: byte i holds columns i, i + 4 …, low bits first.
    """
    widths = [width for width in (4, 2, 1) if bits & width]
    block = 32 // (bits & -bits)
    columns = unpack(codes, bits, codes.shape[1] * 8 // bits)
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[1] % block)).view(len(codes), -1, block)
    planes = []
    for offset, width in zip(accumulate(widths[:-1], initial=0), widths, strict=True):
        parts = (columns >> offset & ((1 << width) - 1)).view(*columns.shape[:2], -1, 8 // width, 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(-1, 1)
        planes.append((parts << shifts).sum(-2, dtype=torch.uint8).flatten(2))
    return tiles(torch.cat(planes, dim=-1).flatten(1).view(torch.int32))


def tiles_bytes(stored: Tensor) -> Tensor:
    """The bit patterns of an 8-bit type [N, C] as bytes under `tiles`."""
    return tiles(stored.view(torch.uint8))


def tiles_zero(zero: Tensor, bits: int) -> Tensor:
    """Packed zero points uint8 [N, B] of `bits` bits to bytes [ceil(N/16), 8·B // bits, 16]."""
    return tiles(unpack(zero, bits, 8 * zero.shape[1] // bits))


def tiles_zero4(zero: Tensor) -> Tensor:
    """Packed zero points uint8 [N, ceil(G/2)] to bytes [ceil(N/16), 2·ceil(G/2), 16]."""
    return tiles(unpack(zero, 4, 2 * zero.shape[1]))


def tiles_zero2(zero: Tensor) -> Tensor:
    """Packed zero points uint8 [N, ceil(G/4)] to bytes [ceil(N/16), 4·ceil(G/4), 16]."""
    return tiles(unpack(zero, 2, 4 * zero.shape[1]))


@dataclass(frozen=True)
class Words:
    """A layout that is `tiles` of words, as the libraries of artifacts make it (`codegen/cpp/layouts.h`).

    Attributes:
        size: bytes of a word; 0 is an element as it is stored.
        mask: what each byte is combined with by exclusive or before.
        bits: of codes that are dealt to the four bytes of a word in turn, byte i getting codes i, i + 4 …; 0 leaves them in order.
    """

    size: int = 0
    mask: int = 0
    bits: int = 0


WORDS: dict[str, Words] = {
    "tiles": Words(),
    "tiles-pairs": Words(4),
    "tiles-planes8": Words(4),
    "tiles-planes4": Words(4, bits=4),
    "tiles-planes2": Words(4, bits=2),
}
"""Layouts by name that need not go through torch."""


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "split-half": split_half,
    "split-half-signed": split_half_signed,
    "split-quarter": split_quarter,
    "split-planes": split_planes,
    "signed": signed,
    "float8": float8,
    "bytes": as_bytes,
    "tiles": tiles,
    "tiles-pairs": tiles_pairs,
    "tiles-planes8": tiles_planes8,
    "tiles-planes4": tiles_planes4,
    "tiles-planes2": tiles_planes2,
    "tiles-zero4": tiles_zero4,
    "tiles-zero2": tiles_zero2,
    "tiles-bytes": tiles_bytes,
    **{f"tiles-planes{bits}": partial(tiles_planes, bits=bits) for bits in (3, 5, 6, 7)},
    **{f"tiles-zero{bits}": partial(tiles_zero, bits=bits) for bits in (3, 5, 6, 7)},
}


def apply_layout(name: str, stored: Tensor) -> Tensor:
    """The tensor as the layout called `name` has it.

    Raises:
        ArtifactError: for a layout that does not exist.
    """
    if name not in LAYOUTS:
        raise ArtifactError(f"layout {name!r}: expected one of {', '.join(LAYOUTS)}; rebuild the artifact with this version")
    return LAYOUTS[name](stored)
