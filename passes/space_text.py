"""The spaces of a graph as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from qcompile.ir.basis import Kind
from qcompile.ir.graph import Graph
from qcompile.passes.space_rules import DEFAULT_RULES
from qcompile.passes.space_system import Rule
from qcompile.passes.space_types import Space
from qcompile.passes.spaces import find_spaces


@dataclass
class _Row:
    """The same axes under each kind of map."""

    space: Space
    admitted: list[str] = field(default_factory=list)
    blocked: dict[tuple[str, str], list[str]] = field(default_factory=dict)


def spaces_text(graph: Graph, *, rules: Mapping[Any, Rule] = DEFAULT_RULES) -> str:
    """Every space as `blocks x size  what writes it -> what reads it: kinds of maps`, and below it who blocks other kinds, and why.

    Deterministic; a space that is alike for several kinds stands once.
    """
    rows: dict[Any, _Row] = {}
    for kind in Kind:
        for space in find_spaces(graph, kind, blocked=True, rules=rules):
            row = rows.setdefault(_key(space), _Row(space))
            if space.blocked is None:
                row.admitted.append(kind.value)
            else:
                row.blocked.setdefault(space.blocked, []).append(kind.value)
    order = {node: place for place, node in enumerate(graph.fx.nodes)}
    ranked = sorted(rows.values(), key=lambda row: (min(order[node] for node in row.space.nodes), -len(row.space.members)))
    heads = [(f"{row.space.blocks} x {row.space.block_size}", _flow(row.space), ", ".join(row.admitted) or "-") for row in ranked]
    sizes, flows = (max((len(head[column]) for head in heads), default=0) for column in (0, 1))
    lines = []
    for row, (size, flow, kinds) in zip(ranked, heads, strict=True):
        lines.append(f"{size:>{sizes}}  {flow:<{flows}}  {kinds}".rstrip())
        lines += [f"{'':>{sizes}}    not {', '.join(names)} ({node}: {reason})" for (node, reason), names in row.blocked.items()]
    return "\n".join(lines) + "\n"


def _key(space: Space) -> Any:
    members = frozenset((member.name, member.axis) for member in space.members)
    return space.blocks, space.block_size, members, frozenset(value.node for value in space.values)


def _flow(space: Space) -> str:
    """Who writes, who reads; what only norms read lives in the first of its values."""
    names = {member.name for member in space.members}
    return f"{_some(space.writers) or '-'} -> {_some(space.readers) or '-'}  ({len(names)} constant{'' if len(names) == 1 else 's'})"


def _some(nodes: Iterable[fx.Node]) -> str:
    names = [node.name for node in nodes]
    return ", ".join(names[:3]) + (f", … {len(names) - 3} more" if len(names) > 3 else "")
