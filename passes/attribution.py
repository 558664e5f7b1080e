"""Shares a loss among those who cause it, by switching groups of them off, and on alone, in as few evaluations as a budget allows."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Members = tuple[int, ...]
"""Numbers of those who cause the loss, in order."""
NEGLIGIBLE = 1e-3
"""Share of the whole below which a group is not looked into."""


@dataclass(frozen=True)
class Blamed:
    """A group: what vanishes when it alone is switched off, and what there is when it alone is on."""

    members: Members
    off: float
    alone: float

    @property
    def share(self) -> float:
        """The mean of both: the Shapley value of a loss that is quadratic in the errors, so that shares add up to the whole."""
        return (self.off + self.alone) / 2


@dataclass(frozen=True)
class Attribution:
    """Groups that together are all, by share, the largest first; the loss with all on and with all off; how many evaluations it took."""

    groups: tuple[Blamed, ...]
    total: float
    floor: float
    evaluations: int


def usual_budget(members: int, most: int) -> int:
    """n·log2(n), but no more than `most` and no fewer than the few that tell kinds apart."""
    return max(8, min(most, math.ceil(members * math.log2(max(2, members)))))


def attribute(groups: Sequence[Members], loss: Callable[[frozenset[int]], float], boundaries: Sequence[int], budget: int) -> Attribution:
    """Halve the group of largest share again and again, as long as evaluations last and anything counts.

    Args:
        groups: to start from, none empty; together all there are.
        loss: of the numbers that are switched off.
        boundaries: layer of each number, by which groups are halved as long as they span several.
        budget: evaluations at most, the two with all on and all off included; the groups to start from are evaluated in any case.
    """
    everyone = frozenset(member for group in groups for member in group)
    known: dict[frozenset[int], float] = {}

    def evaluate(off: frozenset[int]) -> float:
        if off not in known:
            known[off] = loss(off)
        return known[off]

    total, floor = evaluate(frozenset()), evaluate(everyone)

    def missing(parts: Sequence[Members]) -> int:
        return len({off for part in parts for off in (frozenset(part), everyone - frozenset(part))} - set(known))

    def blamed(part: Members) -> Blamed:
        members = frozenset(part)
        return Blamed(part, total - evaluate(members), evaluate(everyone - members) - floor)

    heap: list[tuple[float, int, Blamed]] = []

    def push(part: Members) -> None:
        members = frozenset(part)
        found = Blamed(part, total - evaluate(members), evaluate(everyone - members) - floor)
        heapq.heappush(heap, (-max(abs(found.off), abs(found.alone)), part[0], found))

    for group in groups:
        push(group)
    done: list[Blamed] = []
    least = NEGLIGIBLE * abs(total - floor)
    while heap:
        size, _, first = heapq.heappop(heap)
        parts = halves(first.members, boundaries)
        if -size <= least or len(parts) < 2 or len(known) + missing(parts) > budget:
            done.append(first)
        else:
            for part in parts:
                push(part)
    return Attribution(tuple(sorted(done, key=lambda item: -item.share)), total, floor, len(known))


def halves(members: Members, layers: Sequence[int]) -> list[Members]:
    """Two parts of a group of several: at the boundary of layers nearest to its middle, in the middle where it is of one layer."""
    if len(members) < 2:
        return [members]
    places = [place for place in range(1, len(members)) if layers[members[place]] != layers[members[place - 1]]]
    middle = len(members) // 2
    cut = min(places, key=lambda place: abs(place - middle)) if places else middle
    return [members[:cut], members[cut:]]
