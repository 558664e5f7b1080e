"""Norms give up their gains, and layer norms their means, where an orthogonal change of basis could then pass through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.ir.basis import Kind
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.norm_plan import NORMS, Norm, Plan, find_norms, gainless, make_plan, readers_of
from qcompile.passes.norm_surgery import Surgery
from qcompile.passes.space_types import Member
from qcompile.passes.spaces import DEFAULT_RULES, find_spaces

aten = torch.ops.aten
_WRITERS = (aten.linear.default, aten.embedding.default)
"""Operators behind which a linear can centre what they write."""


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Fold the gain of each norm that stands in the way of a rotation into what reads it (SliceGPT, arXiv:2401.15024).

    A layer norm becomes an RMS norm: what writes its stream is centred, its bias moves into the readers'. A weight that is read in two
    ways (a head tied to its embedding) stays tied by a small linear [K, K] between; with `untie` it is doubled instead.
    """

    name: ClassVar[str] = "fold-norms"
    exact: ClassVar[bool] = True
    untie: bool = False

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Ask the analysis which norms would let rotations pass if they had no gain, and fold those."""
        plan = make_plan(graph)
        useful = _useful(graph, plan)
        if useful and self.untie and _untie_heads(graph):
            plan = make_plan(graph)
        _note_others(graph, plan, ctx, self.name)
        chosen = [norm for norm in find_norms(graph) if norm.node.name in useful and ctx.spend()]
        surgery = Surgery(graph, plan)
        surgery.centre([norm for norm in chosen if norm.centres])
        for norm in chosen:
            surgery.fold(norm)
        graph.remove_dead()
        return bool(chosen)


def _useful(graph: Graph, plan: Plan) -> set[str]:
    """The norms whose operand could be rotated once all that can be folded are RMS norms without a gain."""
    foldable = {norm.node.name for norm in find_norms(graph) if _can_fold(graph, norm, plan)}
    free = find_spaces(plan.copy, Kind.ORTHOGONAL, rules=gainless(DEFAULT_RULES, foldable))
    living = {value.node.name for space in free for value in space.values}
    return {node.name for node in graph.calls(*NORMS) if node.name in foldable and str(node.args[0]) in living}


def _can_fold(graph: Graph, norm: Norm, plan: Plan) -> bool:
    """Whether readers can take over the gain and the bias, and the stream can be centred."""
    name = norm.node.name
    if norm.is_plain or (norm.centres and name not in plan.stream) or (norm.gain is not None and name not in plan.written):
        return False
    if norm.centres and not all(_is_centrable(graph, member, plan) for member in plan.stream[name].members):
        return False
    if norm.gain is None or all(reader.target is aten.linear.default for reader in plan.written[name].readers):
        return True
    reading = [member for member in plan.written[name].members if member.contravariant]
    return norm.bias is None and not any(plan.is_shared(graph, member, reading) for member in reading)


def _is_centrable(graph: Graph, member: Member, plan: Plan) -> bool:
    """Whether nothing else reads what is to be centred, or a linear can be put behind it."""
    writers = plan.users(member)
    return not plan.is_shared(graph, member, [member]) or all(node.target in _WRITERS for node in writers)


def _note_others(graph: Graph, plan: Plan, ctx: PassContext, name: str) -> None:
    for norm in find_norms(graph):
        reason = plan.reasons.get(norm.node.name)
        if reason is not None and not norm.is_plain:
            ctx.note(name, norm.node.name, reason)


def _untie_heads(graph: Graph) -> bool:
    """A linear whose weight an embedding reads too gets a constant of its own (of the same source: no bytes are copied)."""
    changed = False
    for embedding in graph.calls(aten.embedding.default):
        name = str(embedding.args[0].target)  # type: ignore[union-attr]
        for reader in readers_of(graph, name) if graph.constant(embedding.args[0]) is not None else ():
            if reader.target is aten.linear.default:
                own = graph.add_constant(f"{name}.untied", graph.constants[name], source=reader)
                reader.args = (reader.args[0], own, *reader.args[2:])
                changed = True
    return changed
