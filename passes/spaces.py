"""The one analysis behind every outlier pass: which changes of basis each feature axis admits, from data flow alone.

A space is a set of axes, of constants and of values, that one map T acts on together; changing its basis changes no output of the graph.
What a space admits depends on the kind of map, so there is one partition of the axes per kind. See `docs/spaces.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qcompile.ir.basis import Kind
from qcompile.ir.change_basis import Place
from qcompile.ir.graph import Graph
from qcompile.passes.basis_changes import apply_basis_change, apply_online_change
from qcompile.passes.space_rules import DEFAULT_RULES
from qcompile.passes.space_solution import Solution
from qcompile.passes.space_system import Identity, MemberKey, Rule, System
from qcompile.passes.space_types import Member, Space, Value

__all__ = ["DEFAULT_RULES", "Kind", "Member", "Space", "Value", "apply_basis_change", "apply_online_change", "find_spaces"]


def find_spaces(graph: Graph, kind: Kind, *, blocked: bool = False, rules: Mapping[Any, Rule] = DEFAULT_RULES) -> list[Space]:
    """The spaces of `graph` that admit maps of `kind`, in the order of the graph; with `blocked` also those that do not.

    Blocks of one channel are left out where the kind could only be the identity on them.

    Args:
        graph: any graph; what its operators do to channels is read from `rules`.
        kind: the kind of map.
        blocked: whether to list blocked spaces too, with those that block them.
        rules: operator -> rule; operators without one admit only the identity.
    """
    system = System(graph, kind)
    system.read(rules)
    solution = Solution(system)
    order = {node: place for place, node in enumerate(graph.fx.nodes)}
    found = [space for space in _group(system, solution) if space.nodes and (blocked or not space.blockers)]
    return sorted(found, key=lambda space: min(order[node] for node in space.nodes))


Where = MemberKey | fx.Node
Nodes = tuple[fx.Node, ...]


@dataclass
class _Class:
    """What is gathered about one class of atoms."""

    size: int
    places: dict[tuple[Where, int], list[tuple[tuple[int, ...], bool]]]


def _group(system: System, solution: Solution) -> Iterable[Space]:
    """Classes that stand in the same places are blocks of one space."""
    classes: dict[int, _Class] = {}
    for where, axis, layout in _layouts(system):
        for found in solution.occurrences(layout, axis):
            root, parity = solution.find(found.atom)
            size = int(solution.sizes[found.atom])
            entry = classes.setdefault(root, _Class(size, {}))
            entry.places.setdefault((where, axis), []).append((found.index, parity != found.flipped))
    reads, writes = _users(system.reads, solution), _users(system.writes, solution)
    groups: dict[Any, list[int]] = {}
    for root, entry in classes.items():
        signature = (frozenset(entry.places), entry.size, solution.blockers(root))
        groups.setdefault(signature, []).append(root)
    trivial = 0 if system.kind in (Kind.SIGN, Kind.DIAGONAL) else 1
    for roots in groups.values():
        if classes[roots[0]].size > trivial and any(isinstance(where, MemberKey) for where, _ in classes[roots[0]].places):
            readers, writers = (tuple(dict.fromkeys(node for root in roots for node in each.get(root, ()))) for each in (reads, writes))
            yield _space(system, [classes[root] for root in roots], solution.blockers(roots[0]), readers, writers)


def _layouts(system: System) -> Iterable[tuple[Where, int, Tensor]]:
    """Values first, in the order of the graph, then constants."""
    for node, layouts in system.layouts.items():
        if isinstance(layouts, Tensor) and layouts.numel() > 1:
            axis = max(axis for axis, size in enumerate(layouts.shape) if size > 1)
            yield node, axis, layouts
    for key, layout in system.members.items():
        yield key, key.axis, layout


def _space(system: System, classes: list[_Class], blockers: tuple[Identity, ...], readers: Nodes, writers: Nodes) -> Space:
    """The blocks in order, oriented such that the first value (else the first constant) is covariant."""
    found: dict[tuple[Where, int], list[Place]] = {}
    for block, entry in enumerate(classes):
        reference = next(iter(entry.places.values()))[0][1]
        for (where, axis), occurrences in entry.places.items():
            shape = _shape(system, where)
            for index, flipped in occurrences:
                around = tuple(None if place == axis or size == 1 else index[place] for place, size in enumerate(shape))
                contravariant = not system.kind.is_own_dual and flipped != reference
                found.setdefault((where, axis), []).append(Place(around, index[axis], block, contravariant))
    members = [
        Member(where.name, axis, tuple(places), system.offsets.get(where, 0.0))
        for (where, axis), places in found.items()
        if isinstance(where, MemberKey)
    ]
    values = [Value(where, axis, tuple(places)) for (where, axis), places in found.items() if isinstance(where, fx.Node)]
    blocked = tuple((why.node, why.reason) for why in blockers)
    return Space(system.kind, len(classes), classes[0].size, tuple(members), tuple(values), readers, writers, blocked)


def _shape(system: System, where: Where) -> tuple[int, ...]:
    layout = system.members[where] if isinstance(where, MemberKey) else system.layouts[where]
    assert isinstance(layout, Tensor)
    return tuple(layout.shape)


def _users(listed: list[tuple[fx.Node, Tensor]], solution: Solution) -> dict[int, list[fx.Node]]:
    """Class -> the nodes of `listed` whose layouts hold an atom of it, in order."""
    users: dict[int, list[fx.Node]] = {}
    for node, layout in listed:
        for root in sorted({solution.find(atom)[0] for atom in solution.atoms(layout)}):
            users.setdefault(root, []).append(node)
    return users
