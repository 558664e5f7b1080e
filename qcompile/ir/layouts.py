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


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"split-half": split_half}


def apply_layout(name: str, stored: Tensor) -> Tensor:
    """The tensor as the layout called `name` has it.

    Raises:
        ArtifactError: for a layout that does not exist.
    """
    if name not in LAYOUTS:
        raise ArtifactError(f"layout {name!r}: expected one of {', '.join(LAYOUTS)}; rebuild the artifact with this version")
    return LAYOUTS[name](stored)
