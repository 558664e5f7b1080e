"""From nodes to the steps and buffers of a plan."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import PassError
from qcompile.ir.allowed import name_of
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Buffer, Entry, Step
from qcompile.ir.size import Size
from qcompile.ir.symbols import size_expression
from qcompile.ir.verify import where
from qcompile.quant.scheme import dtype_name

aten = torch.ops.aten
qcompile = torch.ops.qcompile
_VIEWS = (
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    aten.slice.Tensor,
    aten.select.int, aten.expand.default, aten.flatten.using_ints, aten.t.default, aten.unflatten.int, aten.narrow.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
)  # fmt: skip
_TOKEN_MAJOR = (
    qcompile.cache_attend.default, qcompile.cache_attend_packed.default, qcompile.attend_settled.default, qcompile.attention.default,
    qcompile.attend_rematerialized.default, qcompile.attend_settled_sources.default,
)  # fmt: skip
_APPENDS = {
    qcompile.cache_append.default: qcompile.cache_append_.default,
    qcompile.append_packed.default: qcompile.append_packed_.default,
}
"""What writes its first two arguments -> the operator that does so in place."""
_IN_PLACE = {
    qcompile.settle.default: qcompile.settle_.default,
    qcompile.retain.default: qcompile.retain_.default,
    qcompile.cache_store.default: qcompile.cache_store_.default,
}
"""What writes its first argument -> the operator that does so in place."""


class StepBuilder:
    """Walks a graph once; `entry` gives its steps and buffers, without planned memory."""

    def __init__(self, graph: Graph) -> None:
        """Build steps and buffers."""
        self.graph = graph
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.values: dict[fx.Node, Any] = {}
        self.fakes: dict[fx.Node, Any] = {}
        self.cache = set(graph.states)
        for node in graph.nodes:
            self._visit(node)
        outputs = graph.output.args[0]
        self.outputs = tuple(self.values[node] for node in outputs if self.values[node] not in self._states())  # type: ignore[union-attr, index]
        for name in self.outputs:
            root = self._root(name)
            if self.buffers[root].kind == "intermediate":
                self.buffers[root] = replace(self.buffers[root], kind="output")

    def _states(self) -> set[str]:
        return {name for name, buffer in self.buffers.items() if buffer.kind == "state"}

    def entry(self, name: str) -> Entry:
        """The entry without planned memory."""
        inputs = tuple(node.name for node in self.graph.placeholders)
        return Entry(name, inputs, self.outputs, self.buffers, tuple(self.steps), {})

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._add(node, node.name, node.meta["val"], "state" if node in self.cache else "input")
        elif node.op == "get_attr":
            self._add(node, str(node.target), node.meta["val"], "constant")
        elif node.op == "call_function":
            self._visit_call(node)

    def _visit_call(self, node: fx.Node) -> None:
        value: Any = node.meta.get("val")
        if node.target is operator.getitem:
            held: Any = node.args
            self.values[node] = self.values[held[0]][held[1]]
            self.fakes[node] = self.fakes[held[0]][held[1]]
        elif isinstance(value, int | float | torch.SymInt):
            self.values[node] = {"size": self._size(value, node)}
        elif isinstance(value, torch.SymBool | torch.SymFloat):
            raise PassError(
                f"plan-memory: {where(node)}: expected a size or a tensor, got a question about sizes whose answer differs from call to "
                "call; remove what depends on it from the model, or cut the model before it"
            )
        elif node.target in _APPENDS:
            self._step(node, _APPENDS[node.target], ())
            states: Any = node.args[:2]
            self.values[node] = tuple(self.values[state] for state in states)
            self.fakes[node] = tuple(self.fakes[state] for state in states)
        elif node.target in _IN_PLACE:
            self._step(node, _IN_PLACE[node.target], ())
            state: Any = node.args[0]
            self.values[node], self.fakes[node] = self.values[state], self.fakes[state]
        elif node.target is qcompile.attend_ranked.default:
            self._attend_ranked(node, value)
        elif isinstance(value, tuple | list):
            self._results(node, value)
        else:
            self._result(node, value)

    def _attend_ranked(self, node: fx.Node, value: Any) -> None:
        """What is attended to has a buffer of its own, the four states keep theirs."""
        name, order, states = f"{node.name}.0", (0, 2, 1, 3), node.args[1:5]
        self._buffer(name, value[0], "intermediate", "", order, node)
        self._step(node, qcompile.attend_ranked_.default, (name,))
        self.values[node] = (name, *(self.values[state] for state in states))  # type: ignore[index]
        self.fakes[node] = (self._fresh(value[0], order), *(self.fakes[state] for state in states))  # type: ignore[index]

    def _result(self, node: fx.Node, value: Tensor) -> None:
        alias, fake = self._view_of(node)
        order = (0, 2, 1, 3) if node.target in _TOKEN_MAJOR else ()
        self._add(node, node.name, value, "intermediate", alias, order, fake)
        self._step(node, node.target, (node.name,))

    def _results(self, node: fx.Node, value: Any) -> None:
        alias, fakes = self._view_of(node)
        names = tuple(f"{node.name}.{index}" for index in range(len(value)))
        for name, item in zip(names, value, strict=True):
            self._buffer(name, item, "intermediate", alias, (), node)
        self.values[node] = names
        self.fakes[node] = fakes if fakes is not None else tuple(self._fresh(item) for item in value)
        self._step(node, node.target, names)

    def _view_of(self, node: fx.Node) -> tuple[str, Any]:
        """The buffer that a view operator's result shares, with the result's fake; ("", None) where it copies."""
        if node.target not in _VIEWS:
            return "", None
        source = node.args[0]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: self.fakes.get(item, item.meta["val"]))
        try:
            with self.graph.mode:
                result = node.target(*args, **kwargs)
        except RuntimeError:  # the example that a size stands for does not fit what values make of it: no view is known
            return "", None
        first = result[0] if isinstance(result, tuple | list) else result
        shared = first.untyped_storage()._cdata == self.fakes[source].untyped_storage()._cdata  # type: ignore[index]
        return (self.values[source], result) if shared else ("", None)  # type: ignore[index]

    def _add(
        self, node: fx.Node, name: str, value: Tensor, kind: str, alias: str = "", order: tuple[int, ...] = (), fake: Any = None
    ) -> None:
        self._buffer(name, value, kind, alias, order, node)
        self.values[node] = name
        self.fakes[node] = fake if fake is not None else self._fresh(value, order)

    def _buffer(self, name: str, value: Tensor, kind: str, alias: str, order: tuple[int, ...], node: fx.Node) -> None:
        shape = tuple(self._size(size, node) for size in value.shape)
        self.buffers[name] = Buffer(name, dtype_name(value.dtype), shape, kind, -1, alias, order)

    def _fresh(self, value: Tensor, order: tuple[int, ...] = ()) -> Tensor:
        """A fake in the memory order that the engine's buffer has."""
        with self.graph.mode:
            if not order:
                return torch.empty(value.shape, dtype=value.dtype)
            stored = torch.empty([value.shape[axis] for axis in order], dtype=value.dtype)
            return stored.permute([order.index(axis) for axis in range(len(order))])

    def _size(self, value: Any, node: fx.Node) -> Size:
        if isinstance(value, float):
            raise PassError(f"plan-memory: {where(node)}: expected an integer size, got {value}")
        return size_expression(value, self.graph.interface.symbols)

    def _step(self, node: fx.Node, target: Any, outputs: tuple[str, ...]) -> None:
        stored = name_of(target)
        assert stored is not None  # the verifier has seen to it
        args = tuple(self._argument(argument) for argument in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        self.steps.append(Step(stored, args, kwargs, outputs, dict(node.meta.get("kernels", {})), node.name))

    def _root(self, name: str) -> str:
        while self.buffers[name].alias:
            name = self.buffers[name].alias
        return name

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            held = self.values[value]
            return {"buffer": held} if isinstance(held, str) else held
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, tuple | list):
            return [self._argument(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        return value
