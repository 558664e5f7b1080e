"""Granularity: which elements of a matrix share one scale."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import FormatError


@dataclass(frozen=True)
class Granularity:
    """One scale per output row and run of `group_size` input columns; `group_size == -1` is one scale per row.

    A size that does not divide the axis makes a shorter last group with a scale of its own.
    """

    group_size: int = -1

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 2:
            raise FormatError(f"group_size={self.group_size}: expected -1 (one scale per channel) or at least 2")

    def size(self, columns: int) -> int:
        """Columns in a full group of a matrix of `columns` columns."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """How many groups (and scales) a row of `columns` columns has."""
        return -(-columns // self.size(columns))

    def __str__(self) -> str:
        return "channel" if self.group_size == -1 else f"g{self.group_size}"


PER_CHANNEL = Granularity(-1)
