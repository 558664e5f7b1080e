"""Quantizers that can be switched off one by one: where each stands in a graph, and what is read in its place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.errors import PassError
from qcompile.ir.constants import Constant, uncast
from qcompile.ir.graph import Graph
from qcompile.ir.layers import layer_of
from qcompile.passes.activation_pairs import arguments, producer
from qcompile.passes.cache_tables import ATTEND_OPTIONS, option
from qcompile.passes.patches import CONVOLUTIONS

aten = torch.ops.aten
qcompile = torch.ops.qcompile
KINDS = ("weights", "activations", "cache")
_ATTENDS = (
    qcompile.cache_attend.default, qcompile.cache_attend_packed.default, qcompile.attend_settled.default, qcompile.attend_ranked.default,
    qcompile.attend_rematerialized.default, qcompile.attend_settled_sources.default,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Exactly:
    """The attention called `attention` of a graph without a cache."""

    graph: Graph
    attention: str


Without = Constant | str | Exactly
"""What is read where a quantizer is off: a float constant, the value that it would round, or attention over what was to be cached."""


@dataclass(frozen=True, eq=False)
class Switch:
    """A quantizer.

    Attributes:
        kind: `weights`, `activations` or `cache`.
        step: the pass that put it there.
        layer: the repeated layer that it belongs to, None where there is none.
        node: the weight, or the node that quantizes or attends, as the listing names it.
        name: the same for people: what is rounded.
        pairs: (node that yields rounded values, what is read in its place).
    """

    kind: str
    step: str
    layer: int | None
    node: str
    name: str
    pairs: tuple[tuple[str, Without], ...]


def new_switches(before: Graph, after: Graph, step: str) -> list[Switch]:
    """The quantizers that the pass called `step` has put into a graph, in order."""
    old = {node.name for node in before.fx.nodes}
    new = [node for node in after.nodes if node.op == "call_function" and node.name not in old]
    weights = [_weight_switch(before, node, step) for node in new if node.target is qcompile.dequantize.default]
    pairs = [_activation_switch(node, step) for node in new if node.target is qcompile.dequantize_activation.default]
    return [*filter(None, weights), *filter(None, pairs), *cache_switches(before, after, step)]


def _weight_switch(before: Graph, node: fx.Node, step: str) -> Switch | None:
    name = str(node.args[0].target).removesuffix(".codes")  # type: ignore[union-attr]
    exact = before.constants.get(name)
    if exact is None:
        return None
    users = list(node.users)
    value = users[0] if len(users) == 1 and users[0].target is aten.reshape.default else node
    pairs: list[tuple[str, Without]] = [(value.name, uncast(exact))]
    for bias in biases_beside(value):  # of a convolution: rounding may move it
        pairs.append((bias.name, uncast(before.constants[str(bias.target)])))
    return Switch("weights", step, layer_of(name), name, name.removesuffix(".weight"), tuple(pairs))


def biases_beside(weight: fx.Node) -> list[fx.Node]:
    """The constants that convolutions with these filters add."""
    found = [arguments(user)["bias"] for user in weight.users if user.target in CONVOLUTIONS]
    return [bias for bias in found if isinstance(bias, fx.Node) and bias.op == "get_attr"]


def _activation_switch(node: fx.Node, step: str) -> Switch | None:
    quantize = producer(node.args[0])
    if quantize is None:
        return None
    value: Any = quantize.args[0]
    weights = [_weight_behind(used) for user in node.users for used in user.all_input_nodes if used is not node]
    read = next(filter(None, weights), "").removesuffix(".weight")
    name = f"input of {read}" if read else value.name
    return Switch("activations", step, layer_of(read), quantize.name, name, ((node.name, value.name),))


def _weight_behind(node: fx.Node) -> str:
    """The constant that a weight operand is made of; "" where it is none."""
    while node.op == "call_function" and node.target in (qcompile.dequantize.default, aten.reshape.default, aten.to.dtype):
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target).removesuffix(".codes") if node.op == "get_attr" else ""


def cache_switches(before: Graph, after: Graph, step: str) -> list[Switch]:
    """One for each attention of `before` that reads a cache in `after`."""
    left = {node.name for node in after.fx.nodes}
    gone = [node for node in before.calls(qcompile.attention.default) if node.name not in left]
    old = {node.name for node in before.fx.nodes}
    attends = [node for node in after.calls(*_ATTENDS) if node.name not in old]
    if len(gone) != len(attends):
        return []
    found = []
    for layer, (node, attend) in enumerate(zip(gone, attends, strict=True)):
        pairs = ((_attended(attend), Exactly(before, node.name)),)
        found.append(Switch("cache", step, layer, attend.name, f"keys and values of attention {layer}", pairs))
    return found


def _attended(attend: fx.Node) -> str:
    """The value that is attended to: one of several results where attention packs too."""
    items = [user for user in attend.users if user.target is operator.getitem and user.args[1] == 0]
    return items[0].name if items else attend.name


Redirects = dict[str, str]
"""Node -> the node that is read in its place."""


def with_alternatives(graph: Graph, switches: Sequence[Switch]) -> tuple[Graph, list[Redirects]]:
    """A copy that also holds what is read where each switch is off, and for each switch what it redirects.

    Raises:
        PassError: naming a quantizer that later passes have removed.
    """
    program = graph.clone()
    named = {node.name: node for node in program.fx.nodes}  # not those that are added: they may bear names of nodes that went
    return program, [dict(_alternative(program, named, switch, on, without) for on, without in switch.pairs) for switch in switches]


def _alternative(program: Graph, named: dict[str, fx.Node], switch: Switch, on: str, without: Without) -> tuple[str, str]:
    if on not in named or (isinstance(without, str) and without not in named):
        raise PassError(f"blame: expected the quantizer {on} of {switch.step} in the final graph, got none; a later pass has changed it")
    if isinstance(without, str):
        return on, without
    if isinstance(without, Constant):
        return on, program.add_constant(f"{switch.node}.exact", without).name
    return on, _attention(program, named, named[switch.node], without).name


def _attention(program: Graph, named: dict[str, fx.Node], attend: fx.Node, without: Exactly) -> fx.Node:
    """Attention over what the graph without a cache attends to, before `attend`; what only that graph computes is copied."""
    node = next(item for item in without.graph.fx.nodes if item.name == without.attention)
    copied: dict[fx.Node, fx.Node] = {}
    constants = without.graph.constants

    def here(used: fx.Node) -> fx.Node:
        name = "positions" if used.op == "placeholder" and used.name == "position_ids" else used.name
        if name in named and named[name].target == (used.target if name == used.name else name):
            return named[name]
        if used not in copied:
            if used.op == "get_attr":
                copied[used] = program.add_constant(str(used.target), constants[str(used.target)])
            else:
                args, kwargs = fx.node.map_arg((used.args, used.kwargs), here)
                copied[used] = program.insert(attend, used.target, args, kwargs, source=used, value=used.meta["val"])  # type: ignore[arg-type]
        return copied[used]

    scale, window, softcap, sinks = (option(node, place, name, default) for place, name, default in ATTEND_OPTIONS)
    read = [here(part) for part in node.args[:3]]
    own = here(sinks) if isinstance(sinks, fx.Node) else None
    args = (*read, None, None, scale, True, window, softcap, own)
    return program.insert(attend, qcompile.attention.default, args, source=attend, value=node.meta["val"])


def by_place(graph: Graph, switches: Iterable[Switch]) -> list[Switch]:
    """In the order in which the graph reaches them."""
    place = {node.name: index for index, node in enumerate(graph.fx.nodes)}
    order = {node.name: min((place[user.name] for user in node.users), default=0) for node in graph.fx.nodes}
    return sorted(switches, key=lambda switch: min(order.get(on, 0) for on, _ in switch.pairs))
