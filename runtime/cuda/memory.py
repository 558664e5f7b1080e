"""Buffers as tensors: intermediates in one arena, everything else in memory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from qcompile.ir.lowered import Buffer, Entry
from qcompile.ir.memory import dtype_of, plan_entry
from qcompile.ir.size import evaluate


def planned_for(entry: Entry, sizes: Mapping[str, int]) -> Entry:
    """The entry as the artifact lays out its intermediates, or laid out anew for sizes beyond what it was planned for."""
    fits = bool(entry.limits) and all(sizes.get(name, most + 1) <= most for name, most in entry.limits.items())
    return entry if fits else plan_entry(entry, dict(sizes))


def allocate(buffer: Buffer, sizes: Mapping[str, int], device: torch.device, arena: Tensor | None = None) -> Tensor:
    """A tensor for the buffer in its own memory order: in the arena (bytes) at the buffer's offset, or in memory of its own."""
    shape, dtype = tuple(evaluate(size, sizes) for size in buffer.shape), dtype_of(buffer.dtype)
    order = buffer.order or tuple(range(len(shape)))
    stored = [shape[axis] for axis in order]
    if arena is None:
        tensor = torch.empty(stored, dtype=dtype, device=device)
    else:
        tensor = arena[buffer.offset : buffer.offset + prod(stored) * dtype.itemsize].view(dtype).view(stored)
    return tensor.permute([order.index(axis) for axis in range(len(order))])
