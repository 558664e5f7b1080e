"""Runs a graph with gradients of its weights, in segments: only what passes from one segment to the next is kept, the rest computed anew.

The operators' references are plain torch, so that calling them directly, instead of as operators, lets autograd look inside. An operator
without such a reference passes no gradient: what lies behind it is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph
from qcompile.passes.convert_dtype import convert
from qcompile.passes.execution import Inputs, call
from qcompile.passes.gradients import DIFFERENTIABLE
from qcompile.passes.straight_through import straighten

_NEIGHBOURS = 24
"""A segment may end where no fewer values are alive within so many nodes: about a transformer layer has two such places."""

Weights = Mapping[str, Tensor]
"""Constants that gradients are taken of, by name."""


@dataclass
class Segment:
    """Nodes that run together.

    Attributes:
        nodes: in order.
        reads: values of earlier segments.
        gives: values that later segments, or the caller, read.
        weights: names of the trained constants that are read here.
    """

    nodes: list[fx.Node]
    reads: list[fx.Node] = field(default_factory=list)
    gives: list[fx.Node] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)


class Differentiable:
    """A graph in float32 as a function of its inputs and of some of its constants."""

    def __init__(self, graph: Graph, ends: Sequence[str], trained: Collection[str], inputs: Inputs, *, exact: bool = False) -> None:
        """Prepare to compute the values named `ends` and gradients of the constants named `trained`.

        Activations and cached vectors that are quantized let gradients through as if they were exact; with `exact` they are.
        """
        self._program = graph.clone()
        convert(self._program, torch.float32, values=False)
        straighten(self._program, exact=exact)
        nodes = {node.name: node for node in self._program.nodes}
        self._inputs = inputs
        self._ends = [nodes[name] for name in ends]
        self._trained = frozenset(trained)
        self._given = _given(self._program, self._trained)
        self._constants: dict[fx.Node, Any] = {}
        self._moved = _moved_by(self._program, self._trained)
        self.segments = self._split(_behind(self._ends, self._given))

    def forward(self, batch: int, weights: Weights) -> dict[fx.Node, Any]:
        """All values that pass between segments, and the ends, without gradient."""
        kept: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for segment in self.segments:
                values = self._run(segment, batch, weights, {node: kept[node] for node in segment.reads})
                kept.update({node: values[node] for node in segment.gives})
        return kept

    def results(self, kept: Mapping[fx.Node, Any]) -> list[Tensor]:
        """The ends among the values that `forward` returned."""
        return [kept[node] for node in self._ends]

    def backward(
        self, batch: int, weights: Weights, kept: Mapping[fx.Node, Any], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """From gradients of the ends those of the weights, each as soon as it is complete: (name, gradient) from the last to the first.

        A weight may be changed once its gradient has come.
        """
        flowing: dict[fx.Node, Tensor] = dict(zip(self._ends, gradients, strict=True))
        first = {name: index for index, segment in reversed(list(enumerate(self.segments))) for name in segment.weights}
        sums: dict[str, Tensor] = {}
        for index in reversed(range(len(self.segments))):
            segment = self.segments[index]
            arriving = {node: flowing.pop(node) for node in segment.gives if node in flowing}
            if arriving and (segment.weights or any(node in self._moved for node in segment.reads)):
                self._back(segment, batch, weights, (kept, arriving), (flowing, sums))
            for name in [name for name in segment.weights if first[name] == index and name in sums]:
                yield name, sums.pop(name)

    def _back(
        self, segment: Segment, batch: int, weights: Weights, known: tuple[Mapping[fx.Node, Any], Mapping[fx.Node, Tensor]],
        sums: tuple[dict[fx.Node, Tensor], dict[str, Tensor]],
    ) -> None:  # fmt: skip
        """Run a segment again with gradient, and add what flows out of it at its front to `sums`."""
        kept, arriving = known
        reads = {node: kept[node] for node in segment.reads}
        leaves = {node: reads[node].detach().requires_grad_() for node in segment.reads if node in self._moved and _is_float(reads[node])}
        own = {name: weights[name].detach().requires_grad_() for name in segment.weights}
        with torch.enable_grad():
            values = self._run(segment, batch, own, {**reads, **leaves})
        ends = [node for node in arriving if values[node].requires_grad]
        if not ends:
            return
        targets = [*leaves.values(), *own.values()]
        found = torch.autograd.grad([values[node] for node in ends], targets, [arriving[node] for node in ends], allow_unused=True)
        for key, gradient in zip([*leaves, *own], found, strict=True):
            if gradient is not None:
                into: dict[Any, Tensor] = sums[1] if isinstance(key, str) else sums[0]
                into[key] = into[key] + gradient if key in into else gradient

    def _run(self, segment: Segment, batch: int, weights: Weights, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        def load(used: fx.Node) -> Any:
            return values[used] if used in values else self._known(used, batch, weights)

        for node in segment.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
            values[node] = call(node, args, kwargs, DIFFERENTIABLE, gradient=torch.is_grad_enabled())
        return values

    def _known(self, node: fx.Node, batch: int, weights: Weights) -> Any:
        """A placeholder, a constant, or what is computed from constants alone."""
        if node.op == "placeholder":
            return self._inputs.tensor(node.name, batch)
        if node.op == "get_attr" and node.target in weights:
            return weights[str(node.target)]
        if node not in self._constants:
            if node.op == "get_attr":
                wanted = self._program.constants[str(node.target)]
                self._constants[node] = wanted.materialize().to(wanted.dtype)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self._known(used, batch, weights))
                self._constants[node] = call(node, args, kwargs, DIFFERENTIABLE)
        return self._constants[node]

    def _split(self, nodes: list[fx.Node]) -> list[Segment]:
        alive = _alive(nodes, self._ends)
        segments, start, trains = [], 0, False
        for index, node in enumerate(nodes):
            trains |= any(used.op == "get_attr" and used.target in self._trained for used in node.all_input_nodes)
            near = alive[max(0, index - _NEIGHBOURS) : index + _NEIGHBOURS + 1]
            if index + 1 == len(nodes) or (trains and alive[index] == min(near)):
                segments.append(Segment(nodes[start : index + 1]))
                start, trains = index + 1, False
        return self._connected(segments)

    def _connected(self, segments: list[Segment]) -> list[Segment]:
        home = {node: index for index, segment in enumerate(segments) for node in segment.nodes}
        wanted = set(self._ends)
        for index, segment in enumerate(segments):
            used = dict.fromkeys(used for node in segment.nodes for used in node.all_input_nodes)
            segment.reads = [node for node in used if node in home and home[node] < index]
            segment.weights = [str(node.target) for node in used if node.op == "get_attr" and node.target in self._trained]
            wanted.update(segment.reads)
        for segment in segments:
            segment.gives = [node for node in segment.nodes if node in wanted]
        return segments


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _given(graph: Graph, trained: Collection[str]) -> set[fx.Node]:
    """Placeholders, constants, and what depends on constants alone that are not trained."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        fixed = node.op == "call_function" and all(used in constant for used in node.all_input_nodes)
        if fixed or (node.op == "get_attr" and node.target not in trained):
            constant.add(node)
    return constant | {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}


def _moved_by(graph: Graph, trained: Collection[str]) -> set[fx.Node]:
    """What changes with the trained constants."""
    moved: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "get_attr" and node.target in trained) or any(used in moved for used in node.all_input_nodes):
            moved.add(node)
    return moved


def _behind(ends: Sequence[fx.Node], given: set[fx.Node]) -> list[fx.Node]:
    """What must be computed for `ends`, in order."""
    found: set[fx.Node] = set()
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node not in found and node not in given:
            found.add(node)
            pending += node.all_input_nodes
    return [node for node in ends[0].graph.nodes if node in found]


def _alive(nodes: Sequence[fx.Node], ends: Sequence[fx.Node]) -> list[float]:
    """After each node, how many values are still to be read; infinite where one of them is no single tensor or number."""
    last = {used: index for index, node in enumerate(nodes) for used in node.all_input_nodes}
    last.update(dict.fromkeys(ends, len(nodes)))
    alive: list[float] = []
    now: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        now = {used for used in (*now, node) if last.get(used, -1) > index}
        whole = all(not isinstance(used.meta.get("val"), tuple | list) for used in now)
        alive.append(len(now) if whole else float("inf"))
    return alive
