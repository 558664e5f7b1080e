"""Solving the constraints of `space_system`: channels fall into atoms, atoms into classes that one map acts on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qcompile.passes.space_system import Array, Identity, System


@dataclass(frozen=True)
class Occurrence:
    """An atom in a layout: the index of its first channel, and whether it stands there as its dual."""

    atom: int
    index: tuple[int, ...]
    flipped: bool


class Solution:
    """Atoms are maximal runs of channels that no constraint divides; tied atoms form a class with one map.

    Attributes:
        starts: the first channel of each atom.
        sizes: its number of channels.
    """

    def __init__(self, system: System) -> None:
        """Solve: cuts spread along ties until nothing changes, then union-find over atoms with a parity."""
        cut = _spread(system)
        self.starts: Array = np.flatnonzero(cut)
        self.sizes: Array = np.diff(self.starts, append=system.channels_made)
        self._parent = list(range(len(self.starts)))
        self._parity = [False] * len(self.starts)
        self._blockers: dict[int, dict[Identity, None]] = {}
        contradictions = [
            (atom, Identity(node, "ties the space to its own dual: what is written there is also read"))
            for atom, node in self._union(system)
        ]
        for start, count, why in system.pins:
            first, last = np.searchsorted(self.starts, (start, start + count))
            contradictions += [(atom, why) for atom in range(first, last)]
        for atom, why in contradictions:
            self._blockers.setdefault(self.find(atom)[0], {})[why] = None

    def find(self, atom: int) -> tuple[int, bool]:
        """The class of an atom, and whether the atom stands there as its dual."""
        path = []
        while self._parent[atom] != atom:
            path.append(atom)
            atom = self._parent[atom]
        parity = False
        for passed in reversed(path):
            parity ^= self._parity[passed]
            self._parent[passed], self._parity[passed] = atom, parity
        return atom, parity

    def blockers(self, root: int) -> tuple[Identity, ...]:
        """Who pinned a class, in the order of the graph; empty if it is free."""
        return tuple(self._blockers.get(root, ()))

    def occurrences(self, layout: Tensor, axis: int) -> list[Occurrence]:
        """The atoms that lie in full along `axis` of a layout, in its order."""
        ids: Array = layout.numpy()
        magnitude = np.abs(ids)
        atoms = np.searchsorted(self.starts, magnitude, side="right") - 1
        first = np.argwhere(self.starts[atoms] == magnitude)
        found = []
        for index in first:
            where = tuple(index.tolist())
            atom = int(atoms[where])
            size = int(self.sizes[atom])
            last = (*where[:axis], where[axis] + size - 1, *where[axis + 1 :])
            if last[axis] < ids.shape[axis] and magnitude[last] == magnitude[where] + size - 1:
                found.append(Occurrence(atom, where, bool(ids[where] < 0)))
        return found

    def atoms(self, layout: Tensor) -> list[int]:
        """The atoms of which a layout holds a part."""
        found: list[int] = np.unique(np.searchsorted(self.starts, np.abs(layout.numpy()).reshape(-1), side="right") - 1).tolist()
        return found

    def _union(self, system: System) -> list[tuple[int, str]]:
        """Join tied atoms; returns those that were found to be their own dual, with the node that says so."""
        broken = []
        for one, other, count, flipped, node in system.ties:
            first, last = np.searchsorted(self.starts, (one, one + count))
            shift = int(np.searchsorted(self.starts, other)) - int(first)
            for atom in range(first, last):
                (a, pa), (b, pb) = self.find(atom), self.find(atom + shift)
                if a != b:
                    self._parent[b], self._parity[b] = a, pa ^ pb ^ flipped
                elif pa ^ pb ^ flipped:
                    broken.append((a, node))
        return broken


def _spread(system: System) -> NDArray[np.bool_]:
    """Where atoms begin (or a gap does): a cut on one side of a tie is a cut on the other."""
    cut = np.zeros(system.channels_made + 1, dtype=bool)
    cut[system.cuts] = True
    for one, other, count, _, _ in system.ties:
        cut[[one, one + count, other, other + count]] = True
    for start, count, _ in system.pins:
        cut[[start, start + count]] = True
    order = list(system.ties)
    changed = True
    while changed:
        changed = False
        for one, other, count, _, _ in order:
            here, there = cut[one : one + count], cut[other : other + count]
            if not np.array_equal(here, there):
                here |= there
                there |= here
                changed = True
        order.reverse()  # ties follow the graph: one sweep forward and one back reach almost everything
    return cut[: system.channels_made]
