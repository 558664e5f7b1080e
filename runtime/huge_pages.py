"""Memory in huge pages, where the system has them: tens of megabytes that every token reads take few entries of page tables."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
"""A cache line, and more than any vector load wants."""
HUGE_PAGE = 2 << 20
"""As x86-64 and most ARM systems have them; where they are larger, fewer of them are used."""


def aligned(size: int) -> int:
    """Bytes up to the next cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class HugeMemory:
    """Memory on the CPU, zero at first, out of which tensors are taken; the system makes its pages when they are first written or read.

    What takes less than one huge page lies in usual ones.
    """

    def __init__(self, size: int) -> None:
        """`size` bytes.

        Raises:
            MemoryError: if the system has fewer.
        """
        self._taken, self._memory = 0, _zeros(size)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next part of it: [*shape], from a cache line on."""
        first, size = self._taken, prod(shape) * dtype.itemsize
        self._taken += aligned(size)
        return self._memory[first : first + size].view(dtype).view(list(shape))


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
