"""Visits nodes in order with their inputs over all calibration data at hand, and lets a visit change what the node computes with.

This is how sequential rounding works: when a linear is reached, everything before it is rounded already; its weight is rounded
against what really comes in, and what follows sees the rounded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, fx

from qcompile.errors import PassError
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph
from qcompile.passes.calibration import Calibration, batches
from qcompile.passes.execution import Execution, Limits, Progress


class NodeInputs(Sequence[tuple[Any, ...]]):
    """What a visited node reads: one tuple of arguments per micro-batch, computed when first asked for.

    Arguments that are computed stand as float32 tensors (integer ones keep their dtype), constants as the graph's nodes.
    A visit that asks for nothing costs nothing: a result that is known already needs no inputs.

    Attributes:
        node: the node of the caller's graph.
        reference: its inputs in the reference graph, or None without one.
    """

    def __init__(self, execution: Execution, stop: int, node: fx.Node, reference: NodeInputs | None = None) -> None:
        """Speak for stop number `stop` of an execution."""
        self.node = node
        self.reference = reference
        self._execution = execution
        self._stop = stop
        self._ready = False

    def __len__(self) -> int:
        return len(self._execution.inputs)

    def __getitem__(self, batch: Any) -> Any:
        if not isinstance(batch, int) or not -len(self) <= batch < len(self):
            raise IndexError(batch)
        arguments: tuple[Any, ...] = fx.node.map_arg(self.node.args, lambda used: self._value(used, batch % len(self)))
        return arguments

    def rows(self, argument: int = 0) -> Iterator[Tensor]:
        """Per micro-batch, one argument's features as float32 [tokens, K], padding left out."""
        for batch in range(len(self)):
            yield real_rows(self[batch][argument], self._execution.inputs.real(batch))

    def _value(self, used: fx.Node, batch: int) -> Any:
        if used.op == "get_attr":
            return used
        if not self._ready:
            self._execution.advance(self._stop)
            self._ready = True
        return self._execution.value(used.name, batch)


Visit = Callable[[fx.Node, NodeInputs], Mapping[str, Tensor | Constant] | None]
"""Called with a node of the caller's graph and its inputs; returns what constants are from here on (name -> value), or None."""


def stream(
    graph: Graph, calibration: Calibration, visit: Visit, nodes: Iterable[fx.Node], *, reference: Graph | None = None,
    limits: Limits | None = None, tokens_at_once: int = 1024, progress: Progress | None = None, narrow: bool = True,
) -> None:  # fmt: skip
    """Call `visit` for each of `nodes` in the graph's order.

    Values are computed on demand in float32 (without gradient), micro-batch by micro-batch through everything that lies between
    two visits, and freed after their last use; what no visited node depends on is never computed.

    Args:
        graph: is not changed by the streaming; a visit may change it as it likes, which the run does not see.
        calibration: what goes in.
        visit: see `Visit`.
        nodes: which nodes to visit.
        reference: a graph with nodes of the same names that runs in lockstep with its own constants, such as the graph before
            rounding; visits find its side in `inputs.reference`.
        limits: what is held in memory.
        tokens_at_once: size of a micro-batch of text.
        progress: called with (done, total) as values are computed.
        narrow: let large linears multiply in bfloat16 where the CPU does that faster.

    Raises:
        PassError: if a node is not in the graph, or the reference has no node of its name.
        SourceError: if the calibration data is not what the graph takes.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    visited = sorted(_known(nodes, order), key=order.__getitem__)
    counterparts = _counterparts(visited, reference) if reference is not None else []
    with ExitStack() as stack:

        def start(program: Graph, stops: Sequence[fx.Node], report: Progress | None) -> Execution:
            names = [[used.name for used in node.all_input_nodes] for node in stops]
            inputs = batches(calibration, program, tokens_at_once)
            return stack.enter_context(Execution(program, inputs, names, limits=limits, progress=report, narrow=narrow))

        execution = start(graph, visited, progress)
        other = start(reference, counterparts, None) if reference is not None else None
        for stop, node in enumerate(visited):
            beside = NodeInputs(other, stop, counterparts[stop]) if other is not None else None
            changed = visit(node, NodeInputs(execution, stop, node, beside))
            for name, value in (changed or {}).items():
                execution.replace(name, value)
            execution.release(stop)
            if other is not None:
                other.release(stop)


def _known(nodes: Iterable[fx.Node], order: Mapping[fx.Node, int]) -> set[fx.Node]:
    found = set(nodes)
    for node in found:
        if node not in order:
            raise PassError(f"stream: expected nodes of the graph, got {node.name} of another one")
    return found


def _counterparts(nodes: Sequence[fx.Node], reference: Graph) -> list[fx.Node]:
    named = {node.name: node for node in reference.nodes}
    missing = [node.name for node in nodes if node.name not in named]
    if missing:
        raise PassError(f"stream: expected the reference graph to have nodes of the same names, got none for {', '.join(missing[:3])}")
    return [named[node.name] for node in nodes]


def real_rows(value: Tensor, real: Tensor | None) -> Tensor:
    """The features (last axis) of every token that is no padding: [tokens, K].

    `real` [B, S] is matched to the value's axes [B, S, ...], [B, ..., S, K] or [B·S, K]; a value with other axes has no padding.
    """
    if real is None:
        return value.reshape(-1, value.shape[-1])
    rows, tokens = real.shape
    if value.dim() >= 3 and value.shape[:2] == real.shape:
        return value[real].reshape(-1, value.shape[-1])
    if value.dim() == 4 and value.shape[0] == rows and value.shape[2] == tokens:
        return value.transpose(1, 2)[real].reshape(-1, value.shape[-1])
    if value.dim() == 2 and value.shape[0] == rows * tokens:
        return value[real.reshape(-1)]
    return value.reshape(-1, value.shape[-1])
