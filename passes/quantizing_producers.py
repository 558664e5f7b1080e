"""A quantize fuses with the norm, gated activation or rotation that makes what it quantizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.ir.graph import Graph, operator_name

aten = torch.ops.aten
qcompile = torch.ops.qcompile


def fuse_producer(graph: Graph, quantize: fx.Node, spend: Callable[[], bool]) -> str | None:
    """Make one operator of `quantize` and what feeds it.

    Returns:
        "" if something was fused, the reason why not, or None for an operator that is fused already.
    """
    if quantize.target is qcompile.quantize_static.default:
        return "its range is static: quantizing is elementwise and stays its own operator"
    if quantize.target not in (qcompile.quantize_activation.default, qcompile.quantize_activation_asym.default):
        return None
    x, *options = quantize.args
    assert isinstance(x, fx.Node)
    matrix: Any = None
    size: Any = 0
    source = x
    if x.target is qcompile.hadamard.default and len(x.users) == 1:
        source, matrix, size = x.args[0], *x.args[1:3]  # type: ignore[assignment]
    kind = _PRODUCED.get(source.target)
    shared = [user.name for user in source.users if user is not x and user is not quantize]
    reason = f"{operator_name(source.target)} makes its values and cannot quantize them"
    if kind is not None and shared:
        reason = f"{source.name} is read by {shared[0]} too"
    if kind is None or shared or (source.target is operator.getitem and not _is_normed(source)):
        if not size:
            return reason
        kind = _rotation
    if not spend():
        return "no fuel left"
    kind(graph, quantize, source, (matrix, size, *options))
    graph.remove_dead()
    return ""


def _is_normed(node: fx.Node) -> bool:
    made = node.args[0]
    return isinstance(made, fx.Node) and made.target is qcompile.add_rms_norm.default and int(node.args[1]) == 1  # type: ignore[arg-type]


def _place(graph: Graph, quantize: fx.Node, before: fx.Node, target: Any, args: tuple[Any, ...], first: int = 0) -> fx.Node:
    """Insert the fused operator, or its asymmetric twin; its results from `first` on take the place of those of `quantize`."""
    if quantize.target is qcompile.quantize_activation_asym.default:
        target = _ASYMMETRIC[target]
    fused = graph.insert(before, target, args, source=quantize)
    after = fused.next
    for part in list(quantize.users):
        graph.replace(part, graph.insert(after, operator.getitem, (fused, part.args[1] + first), source=part))  # type: ignore[operator]
    return fused


def _rotation(graph: Graph, quantize: fx.Node, source: fx.Node, options: tuple[Any, ...]) -> None:
    _place(graph, quantize, quantize, qcompile.hadamard_quantize.default, (source, *options))


def _norm(graph: Graph, quantize: fx.Node, source: fx.Node, options: tuple[Any, ...]) -> None:
    x, weight, eps, offset = (*source.args, 0.0)[:4]
    _place(graph, quantize, quantize, qcompile.norm_quantize.default, (x, weight, eps, offset, *options))


def _residual_norm(graph: Graph, quantize: fx.Node, source: fx.Node, options: tuple[Any, ...]) -> None:
    norm = source.args[0]
    assert isinstance(norm, fx.Node)
    x, residual, weight, eps, offset = (*norm.args, 0.0)[:5]
    fused = _place(graph, quantize, norm, qcompile.add_norm_quantize.default, (x, residual, weight, eps, offset, *options), first=1)
    total = graph.insert(fused.next, operator.getitem, (fused, 0), source=norm)
    for part in [user for user in norm.users if user.args[1] == 0]:
        graph.replace(part, total)


def _gated(graph: Graph, quantize: fx.Node, source: fx.Node, options: tuple[Any, ...]) -> None:
    _place(graph, quantize, quantize, qcompile.gated_quantize.default, (*source.args[:3], *options))


_ASYMMETRIC: dict[Any, Any] = {
    qcompile.norm_quantize.default: qcompile.norm_quantize_asym.default,
    qcompile.add_norm_quantize.default: qcompile.add_norm_quantize_asym.default,
    qcompile.gated_quantize.default: qcompile.gated_quantize_asym.default,
    qcompile.hadamard_quantize.default: qcompile.hadamard_quantize_asym.default,
}
_PRODUCED: dict[Any, Callable[[Graph, fx.Node, fx.Node, tuple[Any, ...]], None]] = {
    qcompile.rms_norm.default: _norm,
    operator.getitem: _residual_norm,
    qcompile.gated_activation.default: _gated,
}
