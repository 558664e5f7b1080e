"""Layouts of packed weights that kernels prefer to the artifact's; applied once at load, by name.

The artifact stores codes uint8 [N, ceil(K·b/8)], low bits first (`qcompile.quant.reference.pack`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.errors import ArtifactError

HALF = 64
"""Columns that lie side by side in the nibbles of one side under `split-half`."""


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


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "split-half": split_half,
    "split-half-signed": split_half_signed,
    "signed": signed,
    "float8": float8,
}


def apply_layout(name: str, stored: Tensor) -> Tensor:
    """The tensor as the layout called `name` has it.

    Raises:
        ArtifactError: for a layout that does not exist.
    """
    if name not in LAYOUTS:
        raise ArtifactError(f"layout {name!r}: expected one of {', '.join(LAYOUTS)}; rebuild the artifact with this version")
    return LAYOUTS[name](stored)
