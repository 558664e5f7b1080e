"""Which tokens of a cached sequence are kept as they came: the first ones, and those of late until a group of them settles.

A token that has settled is read in the format of the pages, and its page is never written again. What has settled depends on the length
of the sequence alone, so that a text read at once and one decoded token by token see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The policy of a cache.

    Attributes:
        first: tokens at the start of a sequence that never settle (attention sinks, arXiv:2309.17453).
        recent: tokens at its end that have not settled yet, at least.
        group: tokens that settle at once, at positions `first` + a multiple of it.
    """

    first: int = 0
    recent: int = 0
    group: int = 1

    def settled(self, length: int) -> int:
        """Where settled tokens end in a sequence of `length`: positions from `first` up to it."""
        return self.first + max(0, length - self.first - self.recent) // self.group * self.group

    @property
    def turning(self) -> int:
        """Most tokens that wait to settle: rows that are written in turn."""
        return self.recent + self.group - 1

    @property
    def rows(self) -> int:
        """Rows of a sequence's unsettled tokens."""
        return self.first + self.turning

    def row(self, position: int) -> int:
        """Where a token that has not settled is kept."""
        return position if position < self.first else self.first + (position - self.first) % self.turning

    def held(self, length: int) -> list[int]:
        """Positions that are kept as they came in a sequence of `length`."""
        return [*range(min(self.first, length)), *range(self.settled(length), length)]

    def page_slot(self, position: int) -> int:
        """The slot, counted over a sequence's pages, of a token that has settled."""
        return position - self.first
