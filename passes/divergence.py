"""How far a graph's results are from those it had before rounding, and the gradient of that.

A language model is judged by the mean KL divergence of the distributions of the next token, in nats per token; the float side is kept as
the hidden states that its head reads, which take a hundredth of the space. Any other module is judged by the mean squared error of each
output, relative to its mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.convert_dtype import convert
from qcompile.passes.execution import call
from qcompile.passes.gradients import DIFFERENTIABLE
from qcompile.passes.stream import real_rows
from qcompile.passes.substitutes import narrowed

_CHUNK_BYTES = 16 << 20
"""Of the logits computed at once: small enough for the allocator to reuse their memory."""


class Divergence(Protocol):
    """A distance between results, at some values of the graph."""

    ends: list[str]
    """Names of the values that it compares."""

    def __call__(self, found: Sequence[Tensor], wanted: Sequence[Tensor], real: Tensor | None) -> tuple[float, list[Tensor]]:
        """The distance of one batch, and its gradient at each of `found`; `real` [B, S] says which tokens are no padding."""


def divergence(graph: Graph, heads: set[fx.Node]) -> Divergence:
    """The distance that suits this graph; `heads` are the linears that make a language model's logits."""
    outputs: Any = graph.output.args[0]
    values = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if graph.interface.kind in ("causal_lm", "cached_lm"):
        values = values[:1]  # the others are caches
    if len(heads) == 1:
        (head,) = heads
        path = _path(head, values[0])
        if path is not None:
            return TokenDivergence(graph, head, path)
    return OutputError(values)


def _path(head: fx.Node, logits: fx.Node) -> list[fx.Node] | None:
    """The calls from the head to the logits; None where they read any other computed value."""
    path: list[fx.Node] = []
    for node in head.graph.nodes:
        if node is head:
            path.append(node)
        elif path and any(used in path for used in node.all_input_nodes):
            if any(used.op != "get_attr" and used not in path for used in node.all_input_nodes):
                return None
            path.append(node)
        if node is logits:
            return path
    return None


class TokenDivergence:
    """KL(float || rounded), mean over tokens."""

    def __init__(self, graph: Graph, head: fx.Node, path: Sequence[fx.Node]) -> None:
        """Judge by what `path` makes of the head's input."""
        source = head.args[0]
        assert isinstance(source, fx.Node)
        self.ends = [source.name]
        program = graph.clone()
        convert(program, torch.float32, values=False)
        named = {node.name: node for node in program.nodes}
        self._source, self._path = named[source.name], [named[node.name] for node in path]
        self._constants = {
            used: self._constant(program, used) for node in self._path for used in node.all_input_nodes if used.op == "get_attr"
        }
        self._rows = max(1, _CHUNK_BYTES // (4 * int(fake_value(path[-1]).shape[-1])))

    def __call__(self, found: Sequence[Tensor], wanted: Sequence[Tensor], real: Tensor | None) -> tuple[float, list[Tensor]]:
        """`found` and `wanted` are hidden states [B, S, K]."""
        (hidden,), (target,) = found, wanted
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool) if real is None else real
        rows, goals = real_rows(hidden, real), real_rows(target, real)
        gradient = torch.empty_like(rows)
        total = 0.0
        for part, goal, out in zip(*(torch.split(item, self._rows) for item in (rows, goals, gradient)), strict=True):
            total += self._chunk(part, goal, out)
        whole = torch.zeros_like(hidden)
        whole[mask] = gradient / len(rows)
        return total / len(rows), [whole]

    def _chunk(self, rows: Tensor, goals: Tensor, out: Tensor) -> float:
        """Sum of the divergence over rows [T, K]; `out` takes the gradient."""
        with torch.no_grad():
            wanted = self._logits(goals.to(rows.dtype)).log_softmax(-1)
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(leaf)
        with torch.no_grad():
            found = logits.log_softmax(-1)
            likely = wanted.exp()
            total = float(torch.dot(likely.view(-1), wanted.sub_(found).view(-1)))
            slope = found.exp_().sub_(likely)
        out.copy_(torch.autograd.grad(logits, leaf, slope)[0])
        return total

    def _logits(self, rows: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {self._source: rows.unsqueeze(0), **self._constants}
        for node in self._path:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = call(node, args, kwargs, DIFFERENTIABLE, gradient=torch.is_grad_enabled())
        result: Tensor = values[self._path[-1]]
        return result.squeeze(0)

    def _constant(self, program: Graph, node: fx.Node) -> Tensor:
        value = program.constants[str(node.target)].materialize().to(torch.float32)
        return narrowed(value) if node is self._path[0].args[1] else value


class OutputError:
    """Mean squared error of each output over its mean square, mean over outputs."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        """Judge by all of `outputs` that are single float tensors."""
        nodes = [node for node in outputs if isinstance(node, fx.Node) and node.op == "call_function"]
        self.ends = [node.name for node in nodes if fake_value(node).is_floating_point()]

    def __call__(self, found: Sequence[Tensor], wanted: Sequence[Tensor], real: Tensor | None) -> tuple[float, list[Tensor]]:
        """`found` and `wanted` are the outputs."""
        total, gradients = 0.0, []
        for result, goal in zip(found, wanted, strict=True):
            difference = result - goal.to(result.dtype)
            scale = 1.0 / (float(goal.square().sum()) + 1e-30) / len(found)
            total += float(difference.square().sum()) * scale
            gradients.append(difference * (2 * scale))
        return total, gradients
