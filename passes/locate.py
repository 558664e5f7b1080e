"""Where two graphs that should compute the same begin to differ."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph, operator_name
from qcompile.passes.example_run import ExampleRun
from qcompile.passes.selection import weight_operand
from qcompile.passes.values import ValueStore

_VALUE_BYTES = 1 << 30
"""Of values that are kept in memory while two graphs are compared; more goes to files."""
_READERS = (
    torch.ops.aten.linear.default, torch.ops.aten.embedding.default, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default,
)  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """What the node at fault reads: `state` is `as before`, `changed` or `new`, `log` what was done to a constant."""

    name: str
    state: str
    constant: str = ""
    log: str = ""


@dataclass(frozen=True)
class Place:
    """The first value that is wrong, at its worst element.

    Attributes:
        node: its name in the graph after the pass.
        operator: what computes it.
        source: `file.py:line` of the model.
        index: of the element.
        expected: the element before the pass.
        got: the element after it.
        error: max|a-b| / max|b| of the value; for a rounding, its noise over its energy.
        operands: what the node reads.
        constants: names of the constants that come into question.
    """

    node: str
    operator: str
    source: str
    index: tuple[int, ...]
    expected: float
    got: float
    error: float
    operands: tuple[Operand, ...] = ()
    constants: tuple[str, ...] = ()

    def __str__(self) -> str:
        there = f"{self.node} ({self.source})" if self.source else self.node
        reads = f", which reads {', '.join(self.constants)}" if self.constants else ""
        return f"first at {there}{reads}: expected {self.expected:.6g} at {list(self.index)}, got {self.got:.6g}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that is not finite becomes text."""
        values = asdict(self)
        for name in ("expected", "got", "error"):
            number = values[name]
            values[name] = number if math.isfinite(number) else str(number)
        return values | {"index": list(self.index), "operands": list(values["operands"]), "constants": list(self.constants)}


@dataclass(frozen=True)
class _Difference:
    error: float
    index: tuple[int, ...]
    expected: float
    got: float


def locate(before: Graph, after: Graph, runner: ExampleRun, *, tolerance: float, wide: bool) -> Place | None:
    """The first value of `after` that is wrong, or None if no output differs.

    Values are matched by the names of their nodes. A pass may change values on purpose (a rotated stream), so one that differs is wrong
    only if nothing that is computed from it agrees again with the graph before.

    Args:
        before: the graph as it should be.
        after: the graph that a pass made of it.
        runner: what runs them.
        tolerance: of the largest magnitude of a value.
        wide: compare in float64.
    """
    with ValueStore(_VALUE_BYTES) as old, ValueStore(_VALUE_BYTES) as new:
        runner.run(before, wide=wide, see=lambda node, value: old.put(node.name, 0, value))
        runner.run(after, wide=wide, see=lambda node, value: new.put(node.name, 0, value))
        return _Comparison(before, after, old, new, tolerance).first()


class _Comparison:
    def __init__(self, before: Graph, after: Graph, old: ValueStore, new: ValueStore, tolerance: float) -> None:
        self._before, self._after, self._old, self._new, self._tolerance = before, after, old, new, tolerance
        self._named = {node.name: node for node in before.nodes}
        self._differences = {node: self._differ(node, node) for node in after.nodes if node.name in self._named}

    def first(self) -> Place | None:
        """The first value that differs and never agrees again, with what made it."""
        vouched = self._vouched()
        for node in self._after.nodes:
            if node.op == "output" or (self._differences.get(node) is not None and node not in vouched):
                made = self._new_operand(node)
                if made is not None:
                    return self._place(*made)
                found = self._differences.get(node)
                return None if found is None else self._place(node, found)
        return None

    def _vouched(self) -> set[fx.Node]:
        """Nodes from which a value is computed that agrees with the graph before: what they changed was undone."""
        vouched: set[fx.Node] = set()
        for node in reversed(self._after.nodes):
            if any(user in vouched or self._agrees(user) for user in node.users):
                vouched.add(node)
        return vouched

    def _agrees(self, node: fx.Node) -> bool:
        return node in self._differences and self._differences[node] is None and _is_numbers(self._value(self._new, node.name))

    def _new_operand(self, node: fx.Node) -> tuple[fx.Node, _Difference] | None:
        """A node that the pass made and that stands where another was read before, if its value is not that one's."""
        counterpart = self._before.output if node.op == "output" else self._named[node.name]
        if counterpart.target is not node.target and node.op != "output":
            return None
        for old, new in zip(_leaves(counterpart), _leaves(node), strict=False):
            if isinstance(old, fx.Node) and isinstance(new, fx.Node) and new.name not in self._named:
                difference = self._differ(old, new)
                if difference is not None:
                    return _producer(new), difference
        return None

    def _differ(self, old: fx.Node, new: fx.Node) -> _Difference | None:
        """How the values of two nodes differ; None where they agree or cannot be compared."""
        a, b = self._value(self._new, new.name), self._value(self._old, old.name)
        if not (_is_numbers(a) and _is_numbers(b)) or a.shape != b.shape or not a.numel():
            return None
        return difference(a, b, self._tolerance)

    @staticmethod
    def _value(store: ValueStore, name: str) -> Any:
        return store.get(name, 0) if store.has(name, 0) else None

    def _place(self, node: fx.Node, found: _Difference) -> Place:
        operands = tuple(self._operand(used) for used in node.all_input_nodes)
        return Place(
            node.name, operator_name(node.target), node.meta.get("source", ""), found.index, found.expected, found.got, found.error,
            operands, self._suspects(node, operands),
        )  # fmt: skip

    def _operand(self, node: fx.Node) -> Operand:
        state = self._state(node)
        if node.op != "get_attr":
            return Operand(node.name, state)
        log = " | ".join(map(str, self._after.constants[str(node.target)].transforms))
        return Operand(node.name, state, str(node.target), log)

    def _state(self, node: fx.Node) -> str:
        if node.name not in self._named:
            return "new"
        if node.op == "get_attr":
            old = self._before.constants.get(str(node.target))
            return "as before" if old is not None and old.key == self._after.constants[str(node.target)].key else "changed"
        if node in self._differences and self._differences[node] is not None:
            return "changed"
        return "as before" if self._keys(self._before, self._named[node.name]) == self._keys(self._after, node) else "changed"

    def _keys(self, graph: Graph, node: fx.Node) -> list[str]:
        """Keys of the constants that a value is made of, where it is made of nothing else."""
        static = _constants_alone(node)
        return [] if static is None else [graph.constants[name].key for name in static]

    def _suspects(self, node: fx.Node, operands: tuple[Operand, ...]) -> tuple[str, ...]:
        """The node's own constants; of a node without, those behind operands that stayed as they were while others changed."""
        own = [name for used in node.all_input_nodes for name in (_constants_alone(used) or ())]
        if own or {operand.state for operand in operands} != {"as before", "changed"}:
            return tuple(own)
        left = [used for used, operand in zip(node.all_input_nodes, operands, strict=True) if operand.state == "as before"]
        return tuple(name for used in left for below in used.all_input_nodes for name in (_constants_alone(below) or ()))


def difference(got: Tensor, expected: Tensor, tolerance: float) -> _Difference | None:
    """The worst element, or None if none differs by more than `tolerance` of the largest magnitude; NaN beside a number is the worst."""
    distance = (got.double() - expected.double()).abs()
    distance = distance.masked_fill(got.isnan() & expected.isnan(), 0.0).masked_fill(got == expected, 0.0).nan_to_num(math.inf, math.inf)
    worst = int(distance.argmax())
    finite = expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    error = float(distance.flatten()[worst]) / (finite or 1.0)
    if error <= tolerance:
        return None
    index = tuple(int(place) for place in torch.unravel_index(torch.tensor(worst), got.shape))
    return _Difference(error, index, float(expected[index]), float(got[index]))


def worst_rounding(before: Graph, after: Graph, runner: ExampleRun) -> Place | None:
    """The weight of a linear, embedding or convolution that a rounding pass moved furthest: `error` is its noise over its energy."""
    named = {node.name: node for node in before.nodes}
    worst: Place | None = None
    for node in after.calls(*_READERS):
        old = named.get(node.name)
        if old is not None and old.target is node.target:
            found = _rounding(before, after, old, node, runner)
            if found is not None and (worst is None or found.error > worst.error):
                worst = found
    return worst


def _rounding(before: Graph, after: Graph, old: fx.Node, new: fx.Node, runner: ExampleRun) -> Place | None:
    operands = weight_operand(old), weight_operand(new)
    names = tuple(map(_constants_alone, operands))
    if names[0] is None or names[1] is None or _keys_of(before, names[0]) == _keys_of(after, names[1]):
        return None
    expected, got = runner.static(before, operands[0]).float(), runner.static(after, operands[1]).float()
    if expected.shape != got.shape:
        return None
    found = difference(got, expected, 0.0)
    if found is None:
        return None
    noise = float((got - expected).square().sum()) / (float(expected.square().sum()) or 1.0)
    states = tuple(Operand(name, "new" if name not in before.constants else "changed", name) for name in names[1])
    source = new.meta.get("source", "")
    return Place(new.name, operator_name(new.target), source, found.index, found.expected, found.got, noise, states, names[1])


def _keys_of(graph: Graph, names: tuple[str, ...]) -> list[str]:
    return [graph.constants[name].key for name in names]


def _constants_alone(node: fx.Node) -> tuple[str, ...] | None:
    """The constants that a node is made of; None if it depends on an input too."""
    seen: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        used = pending.pop()
        if used.op == "placeholder":
            return None
        if used not in seen:
            seen[used] = None
            pending += reversed(used.all_input_nodes)
    return tuple(str(used.target) for used in seen if used.op == "get_attr")


def _leaves(node: fx.Node) -> Iterator[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    yield from found


def _producer(node: fx.Node) -> fx.Node:
    """The operator behind one of its results."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
