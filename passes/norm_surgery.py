"""What folding a norm does to the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qcompile.ir.change_basis import carrier_name, then_before_casts
from qcompile.ir.constants import Constant, Transform, tensor_constant
from qcompile.ir.folds import Centred, PlusProduct, Scaled
from qcompile.ir.graph import Graph
from qcompile.passes.norm_plan import Norm, Plan, find_norms

aten = torch.ops.aten


class Surgery:
    """Carries out a plan on the graph that it was made for."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        """Nodes are looked up by name: the plan speaks of a copy."""
        self._graph, self._plan = graph, plan
        self._nodes = {node.name: node for node in graph.nodes}

    def centre(self, norms: Sequence[Norm]) -> None:
        """Take the mean out of all that writes what these layer norms read, once for each constant."""
        members = {member.name: member for norm in norms for member in self._plan.stream[norm.node.name].members}
        done: set[str] = set()
        for member in members.values():
            name = self._plan.origin[member.name]
            if self._plan.is_shared(self._graph, member, list(members.values())):
                for user in self._plan.users(member):
                    self._centre_behind(self._nodes[user.name], name)
            elif name not in done:
                self._append(name, Centred(member.axis))
            done.add(name)

    def fold(self, norm: Norm) -> None:
        """Hand gain and bias on, and leave an RMS norm without either."""
        if norm.gain is not None:
            self._hand_on(norm, norm.gain)
        if norm.centres:
            args = (norm.node.args[0], None, norm.eps)
            plain = self._graph.insert(norm.node, torch.ops.qcompile.rms_norm.default, args, source=norm.node)
            self._graph.replace(norm.node, plain)
        else:
            norm.node.update_arg(norm.place, None)
            if norm.offset:
                norm.node.update_arg(norm.place + 2, 0.0)

    def _hand_on(self, norm: Norm, gain: fx.Node) -> None:
        """A weight takes the gain of what it reads; where others read it too, a diagonal linear before it does."""
        reading = [member for member in self._plan.written[norm.node.name].members if member.contravariant]
        scaled = Scaled(0, self._graph.constants[str(gain.target)], norm.offset)
        done: set[str] = set()
        shared: list[fx.Node] = []
        for member in reading:
            name, users = self._plan.origin[member.name], [self._nodes[user.name] for user in self._plan.users(member)]
            if self._plan.is_shared(self._graph, member, reading):
                shared += users
                continue
            for user in users if norm.bias is not None else ():
                self._shift(user, self._graph.constants[str(norm.bias.target)])  # type: ignore[union-attr]
            if name not in done:
                self._append(name, Scaled(member.axis, scaled.gain, scaled.offset))
            done.add(name)
        if shared:
            self._diagonal_before(shared, carrier_name(str(gain.target), "diagonal"), scaled, norm.bias)

    def _shift(self, reader: fx.Node, vector: Constant) -> None:
        """The bias of a linear takes over what was added to its operand."""
        x, weight, bias = (*reader.args, None)[:3]
        matrix = self._graph.constants[str(weight.target)]  # type: ignore[union-attr]
        old = self._graph.constant(bias) or tensor_constant(torch.zeros(matrix.shape[0], dtype=matrix.dtype))
        moved = then_before_casts(old, PlusProduct(matrix, vector), old.dtype)
        name = str(bias.target) if isinstance(bias, fx.Node) else f"{str(weight.target).removesuffix('.weight')}.bias"  # type: ignore[union-attr]
        reader.args = (x, weight, self._graph.add_constant(name, moved, source=reader))

    def _diagonal_before(self, readers: list[fx.Node], name: str, scaled: Scaled, bias: fx.Node | None) -> None:
        """One linear diag(gain), with the norm's bias, for all `readers` of one value: a rotation on either side makes it dense."""
        values = dict.fromkeys(reader.args[0] for reader in readers)
        for x in values:
            assert isinstance(x, fx.Node)
            behind = [reader for reader in readers if reader.args[0] is x]
            matrix = self._square(x, name, scaled)
            made = self._graph.insert(x.next, aten.linear.default, (x, matrix, bias), source=x)
            for reader in behind:
                reader.replace_input_with(x, made)

    def _centre_behind(self, writer: fx.Node, name: str) -> None:
        """What is written is centred by a linear, because the constant may not be."""
        matrix = self._square(writer, carrier_name(name, "centring"), Centred(1))
        users = list(writer.users)
        made = self._graph.insert(writer.next, aten.linear.default, (writer, matrix), source=writer)
        for user in users:
            user.replace_input_with(writer, made)

    def _square(self, x: fx.Node, name: str, transform: Transform) -> fx.Node:
        """The unit matrix over the channels of x, transformed."""
        value = x.meta["val"]
        return self._graph.add_constant(name, tensor_constant(torch.eye(value.shape[-1], dtype=value.dtype)).then(transform), source=x)

    def _append(self, name: str, transform: Transform) -> None:
        constant = self._graph.constants[name]
        self._graph.bind(name, then_before_casts(constant, transform, constant.dtype))


def give_gains(graph: Graph) -> bool:
    """A gain of ones for each RMS norm that has none and that linears read, so that a diagonal finds room in it; True if there was any."""
    bare = [norm for norm in find_norms(graph) if norm.is_plain and _is_read_by_linears(norm.node)]
    for norm in bare:
        value = norm.node.args[0].meta["val"]  # type: ignore[union-attr]
        ones = tensor_constant(torch.ones(value.shape[-1], dtype=value.dtype))
        norm.node.update_arg(norm.place, graph.add_constant(f"{norm.node.name}.gain", ones, source=norm.node))
    return bool(bare)


def _is_read_by_linears(norm: fx.Node) -> bool:
    """Whether linears read the normalised value, which of a sum and its norm is the second."""
    read = [norm] if norm.target is torch.ops.qcompile.rms_norm.default else [user for user in norm.users if user.args[1:] == (1,)]
    return any(user.target is aten.linear.default for value in read for user in value.users)
