"""Where buffers lie in an arena: offsets such that no two that live at once overlap (greedy by size, arXiv:2001.03288)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALIGNMENT = 64
"""A cache line, and more than any vector load wants."""


@dataclass(frozen=True)
class Lifetime:
    """Bytes that a buffer needs and the steps, both inclusive, between which it must keep them."""

    size: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


def assign_offsets(lifetimes: Mapping[str, Lifetime]) -> tuple[dict[str, int], int]:
    """An offset in bytes for each buffer, and the arena's size.

    The largest are placed first, each into the smallest gap between those placed already that live at the same time.
    """
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for name, life in sorted(lifetimes.items(), key=lambda item: (-item[1].size, item[0])):
        size = -(-life.size // ALIGNMENT) * ALIGNMENT
        offset = _best_gap([(start, end) for start, end, other in placed if other.overlaps(life)], size)
        offsets[name] = offset
        placed.append((offset, offset + size, life))
        placed.sort(key=lambda item: item[:2])
    return offsets, max((end for _, end, _ in placed), default=0)


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    best, best_size, cursor = -1, 0, 0
    for start, end in taken:
        gap = start - cursor
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = cursor, gap
        cursor = max(cursor, end)
    return best if best >= 0 else cursor
