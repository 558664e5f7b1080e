"""Runs a part of a graph at sizes of one's choice: what a mask hides, and what a region computes, is seen rather than guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import QCompileError
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph, real_tensors

_MOST_BYTES = 1 << 26
"""Of a constant that is read: tables of masks are smaller, weights of models are not looked at."""


class UnknownValueError(QCompileError):
    """A value depends on what was not given."""


class Probe:
    """Values of nodes for sizes of symbols and values of some nodes; computed on demand and kept."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int], given: Mapping[fx.Node, Tensor]) -> None:
        """`sizes` by symbol (`s27`); a symbol that is not there is unknown."""
        self._graph = graph
        self._sizes = dict(sizes)
        self._known: dict[fx.Node, Any] = dict(given)

    def value(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            UnknownValueError: if it depends on an input that was not given, on a large constant, or on another symbol.
        """
        for needed in self._order(node):
            if needed not in self._known:
                self._known[needed] = self._compute(needed)
        return self._known[node]

    def size(self, value: int | torch.SymInt) -> int:
        """A size in numbers."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        missing = [str(symbol) for symbol in expression.free_symbols if str(symbol) not in self._sizes]
        if missing:
            raise UnknownValueError(f"probe: expected sizes of all symbols, got none of {missing[0]}")
        return int(expression.subs({symbol: self._sizes[str(symbol)] for symbol in expression.free_symbols}))

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node in numbers."""
        return [self.size(size) for size in node.meta["val"].shape]

    def _order(self, node: fx.Node) -> list[fx.Node]:
        """What must be computed first, without recursion: graphs are deep."""
        order: dict[fx.Node, None] = {}
        waiting: list[tuple[fx.Node, bool]] = [(node, False)]
        while waiting:
            current, ready = waiting.pop()
            if current in self._known or current in order:
                continue
            if ready or _is_size(current):
                order[current] = None
            else:
                waiting += [(current, True), *((used, False) for used in current.all_input_nodes)]
        return list(order)

    def _compute(self, node: fx.Node) -> Any:
        if _is_size(node):
            return self.size(node.meta["val"])
        if node.op == "get_attr":
            return _read(self._graph.constants[str(node.target)], node)
        if node.op != "call_function":
            raise UnknownValueError(f"probe: expected a value of {node.name}, got none")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: self._known[item])
        try:
            with real_tensors(), torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        # Sizes of one's choice may not fit; then the part is not what it was taken for.
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise UnknownValueError(f"probe: {node.name}: cannot be computed at these sizes: {error}") from error


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _read(constant: Constant, node: fx.Node) -> Tensor:
    if not constant.is_bound or constant.nbytes > _MOST_BYTES:
        raise UnknownValueError(f"probe: {node.name}: expected a small constant, got one of {constant.nbytes} bytes")
    with real_tensors():
        return constant.materialize()


def behind(node: fx.Node) -> Iterator[fx.Node]:
    """The node and everything it is computed from, each once."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        fresh = [used for used in current.all_input_nodes if used not in seen]
        seen.update(fresh)
        waiting += fresh


def symbols_of(node: fx.Node) -> set[str]:
    """The symbols in a node's shape."""
    sizes = getattr(node.meta.get("val"), "shape", ())
    return {str(symbol) for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
