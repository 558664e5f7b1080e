"""Which norms can give their gain to what reads them, and which streams can be centred: read off the analysis of spaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qcompile.ir.basis import Kind
from qcompile.ir.graph import Graph
from qcompile.passes.space_rules import with_gain
from qcompile.passes.space_system import Identity, Layout, Layouts, Rule, System
from qcompile.passes.space_types import Member, Space
from qcompile.passes.spaces import DEFAULT_RULES, find_spaces

aten = torch.ops.aten
qcompile = torch.ops.qcompile

NORMS = (qcompile.rms_norm.default, qcompile.add_rms_norm.default, aten.layer_norm.default)
"""Operators with a gain."""


@dataclass(frozen=True)
class Norm:
    """A norm as its operator spells it.

    Attributes:
        node: the call.
        gain: the node of its gain, or None.
        bias: of a layer norm, or None.
        offset: added to the gain.
        place: which argument the gain is.
        eps: added to the mean square.
        centres: whether it subtracts the mean first.
    """

    node: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    offset: float
    place: int
    eps: float
    centres: bool

    @property
    def is_plain(self) -> bool:
        """Whether it lets rotations pass as it is."""
        return self.gain is None and not self.centres


def read_norm(node: fx.Node) -> Norm:
    """The parts of a norm."""
    args: Any = node.args
    if node.target is aten.layer_norm.default:
        _, _, gain, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
        return Norm(node, gain, bias, 0.0, 2, eps, centres=True)
    place = 1 if node.target is qcompile.rms_norm.default else 2
    gain, eps, offset = (*args[place:], 0.0)[:3]
    return Norm(node, gain, None, offset, place, eps, centres=False)


def find_norms(graph: Graph) -> list[Norm]:
    """All norms over the last axis, in order."""
    norms = [read_norm(node) for node in graph.calls(*NORMS)]
    return [norm for norm in norms if not norm.centres or len(norm.node.args[1]) == 1]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """What the analysis says about the norms of a graph, seen on a copy in which each linear has its weight for itself.

    Attributes:
        copy: that copy; its nodes have the names of the original's.
        origin: the original's name of each constant of the copy.
        written: for each norm the space of its result, if its gain is all that writes it and linear operators all that read it.
        stream: for each layer norm the space of its operand, if nothing but layer norms reads it.
        reasons: why not, for the others.
    """

    copy: Graph
    origin: dict[str, str]
    written: dict[str, Space] = field(default_factory=dict)
    stream: dict[str, Space] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def users(self, member: Member) -> list[fx.Node]:
        """The nodes of the copy that read a member."""
        return readers_of(self.copy, member.name)

    def is_shared(self, graph: Graph, member: Member, members: Sequence[Member]) -> bool:
        """Whether anything but the users of `members` reads the constant of a member in the original."""
        name = self.origin[member.name]
        covered = {user.name for other in members if self.origin[other.name] == name for user in self.users(other)}
        return any(user.name not in covered for user in readers_of(graph, name))


def make_plan(graph: Graph) -> Plan:
    """Look at each norm."""
    plan = Plan(*untied(graph))
    spaces = find_spaces(plan.copy, Kind.INVERTIBLE, blocked=True, rules=DEFAULT_RULES | dict.fromkeys(NORMS, _free_norm))
    for norm in find_norms(plan.copy):
        if norm.gain is not None:
            _plan_gain(norm, spaces, plan)
        if norm.centres:
            _plan_stream(norm, spaces, plan)
    return plan


def _plan_gain(norm: Norm, spaces: list[Space], plan: Plan) -> None:
    """Free, whole, written by this gain and bias alone."""
    assert norm.gain is not None
    own = {str(vector.target) for vector in (norm.gain, norm.bias) if vector is not None}
    space = next((space for space in spaces if any(member.name in own for member in space.members)), None)
    if space is None or space.size != norm.gain.meta["val"].shape[-1] or not all(_is_whole(member, space) for member in space.members):
        plan.reasons[norm.node.name] = "only a part of its result is read by what could take over the gain"
        return
    written = {member.name for member in space.members if not member.contravariant}
    if space.blocked is None and written == own:
        plan.written[norm.node.name] = space
    else:
        node, reason = space.blocked or (norm.node.name, f"shares its result with {', '.join(sorted(written - own))}")
        plan.reasons[norm.node.name] = f"its gain cannot move into what reads it ({node}: {reason})"


def _plan_stream(norm: Norm, spaces: list[Space], plan: Plan) -> None:
    """Free, and read by layer norms alone: those do not see a mean."""
    x = norm.node.args[0]
    space = next((space for space in spaces if any(value.node is x for value in space.values)), None)
    if space is None or space.blocked is not None:
        node, reason = space.blocked if space is not None and space.blocked is not None else (str(x), "holds no free channels")
        plan.reasons[norm.node.name] = f"its operand cannot be centred ({node}: {reason})"
    elif space.readers or not all(_is_whole(member, space) for member in space.members):
        reader = space.readers[0].name if space.readers else str(x)
        plan.reasons[norm.node.name] = f"its operand cannot be centred ({reader}: reads its mean)"
    else:
        plan.stream[norm.node.name] = space


def _is_whole(member: Member, space: Space) -> bool:
    return space.blocks == 1 and len(member.places) == 1 and all(item is None for item in member.places[0].index)


def _free_norm(system: System, node: fx.Node) -> Layouts:
    """A layer norm does not see what the mean of its operand is; what a gain writes is a space of its own."""
    norm = read_norm(node)
    total = system.channels(node.args[0], -1, node)  # type: ignore[arg-type]
    system.cut(total, -1)
    if not norm.centres:
        system.pin(total, Identity(node.name, "weighs its channels by their RMS, which a gain would change"))
    if norm.gain is None:
        result: Layout = Identity(node.name, "has no gain")
    else:
        result = with_gain(system, node, None, norm.gain, norm.offset, norm.bias)
    if node.target is not qcompile.add_rms_norm.default:
        return result
    system.tie(total, system.channels(node.args[1], -1, node), node)  # type: ignore[arg-type]
    return total, result


def gainless(rules: dict[Any, Rule], names: set[str]) -> dict[Any, Rule]:
    """The rules with the norms called `names` as they will be: RMS norms without a gain."""

    def rule(system: System, node: fx.Node) -> Layouts:
        if node.name not in names:
            return rules[node.target](system, node)
        channels = system.channels(node.args[0], -1, node)  # type: ignore[arg-type]
        system.cut(channels, -1)
        if node.target is not qcompile.add_rms_norm.default:
            return channels
        system.tie(channels, system.channels(node.args[1], -1, node), node)  # type: ignore[arg-type]
        return channels, channels

    return rules | dict.fromkeys(NORMS, rule)


def untied(graph: Graph) -> tuple[Graph, dict[str, str]]:
    """A copy in which each linear has its weight for itself, and the original's name for each constant of the copy."""
    copy = graph.clone()
    origin = {name: name for name in copy.constants}
    for node in copy.calls(aten.linear.default):
        weight = node.args[1]
        if copy.constant(weight) is not None and len(readers_of(copy, str(weight.target))) > 1:  # type: ignore[union-attr]
            name = str(weight.target)  # type: ignore[union-attr]
            own = copy.add_constant(f"{name}@{node.name}", copy.constants[name])
            origin[str(own.target)] = name
            node.args = (node.args[0], own, *node.args[2:])
    return copy, origin


def readers_of(graph: Graph, name: str) -> list[fx.Node]:
    """Every node that reads the constant called `name`."""
    return [user for node in graph.fx.find_nodes(op="get_attr", target=name) for user in node.users]
