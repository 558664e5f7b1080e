"""Memory in huge pages, where the system has them: tens of megabytes that every token reads take few entries of page tables."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
"""A cache line, and more than any vector load wants."""
HUGE_PAGE = 2 << 20
"""As x86-64 and most ARM systems have them; where they are larger, fewer of them are used."""


def huge_zeros(kinds: Iterable[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Tensors of these shapes and types on the CPU, zero, one behind the other in one memory, each from a cache line on.

    The system makes its pages when they are first written or read. What takes less than one huge page lies in usual ones.

    Raises:
        MemoryError: if the system has fewer bytes.
    """
    parts = [(list(shape), dtype, prod(shape) * dtype.itemsize) for shape, dtype in kinds]
    *places, size = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for *_, size in parts), initial=0)
    memory = _zeros(size)
    return [memory[first : first + size].view(dtype).view(shape) for first, (shape, dtype, size) in zip(places, parts, strict=True)]


def _zeros(size: int) -> Tensor:
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    try:
        # Memory that processes may share, as `mmap` makes it by itself, gets no huge pages, nor does what begins beside their borders.
        mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"expected {size} bytes of memory, the system gives none: {error}") from None
    mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HUGE_PAGE :][:size]
