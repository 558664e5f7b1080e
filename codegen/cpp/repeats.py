"""Layers in a list of calls: stretches that are made again and again, each time over tensors a fixed way further on in the table."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

LEAST_SAVED = 8
"""Calls that a loop must save: below that it is longer to read than what it stands for."""


@dataclass(frozen=True)
class Item:
    """A call: what two calls must have in common to be one, and the numbers of its tensors."""

    kind: Hashable
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Repeat:
    """Calls `first` to `first + length`, and `count - 1` more times the same over other tensors.

    Attributes:
        first: the first call.
        length: how many calls there are in each time.
        count: how many times; 1 is a call by itself.
        stride: how much further on in the table a tensor is each time, if it is another one.
        moving: the numbers of the first time's tensors that are others each time.
    """

    first: int
    length: int
    count: int = 1
    stride: int = 0
    moving: frozenset[int] = frozenset()

    @property
    def saved(self) -> int:
        """Calls that need not be written."""
        return self.length * (self.count - 1)


def find_repeats(items: Sequence[Item]) -> list[Repeat]:
    """All calls in order, as repeats and single ones. From the first call on the longest repeat is taken that saves enough."""
    found, first = list[Repeat](), 0
    while first < len(items):
        lengths = range(1, (len(items) - first) // 2 + 1)
        candidates = (_repeat(items, first, length) for length in lengths if items[first].kind == items[first + length].kind)
        best = max(candidates, key=lambda repeat: (repeat.saved, -repeat.length), default=Repeat(first, 1))
        best = best if best.saved >= LEAST_SAVED else Repeat(first, 1)
        found.append(best)
        first += best.length * best.count
    return found


def _repeat(items: Sequence[Item], first: int, length: int) -> Repeat:
    """How often `length` calls from `first` on are made again behind each other."""
    begin = items[first : first + length]
    steps = _steps(begin, items[first + length : first + 2 * length])
    if steps is None:
        return Repeat(first, length)
    count = 1
    while (following := items[first + count * length : first + (count + 1) * length]) and _moved(begin, following, steps, count):
        count += 1
    return Repeat(first, length, count, max(steps.values()), frozenset(number for number, step in steps.items() if step))


def _steps(begin: Sequence[Item], following: Sequence[Item]) -> dict[int, int] | None:
    """How far each tensor moves from one time to the next: not at all, or as far as all that move; None if this is no repetition."""
    steps: dict[int, int] = {}
    for one, other in zip(begin, following, strict=True):
        if one.kind != other.kind:
            return None
        for number, moved in zip(one.tensors, other.tensors, strict=True):
            if steps.setdefault(number, moved - number) != moved - number:
                return None
    strides = set(steps.values()) - {0}
    return steps if len(strides) == 1 and min(strides) > 0 else None


def _moved(begin: Sequence[Item], following: Sequence[Item], steps: dict[int, int], times: int) -> bool:
    return len(begin) == len(following) and all(
        one.kind == other.kind and other.tensors == tuple(number + times * steps[number] for number in one.tensors)
        for one, other in zip(begin, following, strict=True)
    )
