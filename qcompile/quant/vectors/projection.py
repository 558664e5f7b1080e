"""Vectors in another basis, each by the same sums whatever else is projected with it."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 16
"""Vectors of a tile: one shape of product however many there are, so one order of summation."""


def project(x: Tensor, basis: Tensor) -> Tensor:
    """X [..., L, T, D] times `basis` [L or 1, D, R], head by head: float32 [..., L, T, R].

    A vector's result does not depend on how many others there are, nor on x's memory order.
    """
    heads, size = x.shape[-3], x.shape[-1]
    matrix = basis.to(torch.float32).expand(heads, -1, -1).contiguous()
    by_head = x.to(torch.float32).reshape(-1, heads, x.shape[-2], size).transpose(0, 1)
    rows = by_head.reshape(heads, -1, size)
    count = rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % _ROWS))
    tiles = [torch.bmm(tile.contiguous(), matrix) for tile in torch.split(rows, _ROWS, dim=1)] if count else [rows @ matrix]
    found = torch.cat(tiles, dim=1)[:, :count].view(*by_head.shape[:-1], matrix.shape[-1])
    return found.transpose(0, 1).reshape(*x.shape[:-1], matrix.shape[-1])
