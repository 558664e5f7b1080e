"""Values that a graph quantizes while it runs, taken as exact, or as rounded with the gradient of what was rounded (arXiv:1308.3432)."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph

qcompile = torch.ops.qcompile
_QUANTIZERS = (qcompile.quantize_activation.default, qcompile.quantize_activation_asym.default, qcompile.quantize_static.default)


def straighten(graph: Graph, *, exact: bool) -> None:
    """Let quantized activations pass gradients, or with `exact` leave out their rounding and that of cached vectors.

    The graph can then be run, not compiled.
    """
    for node, source in _quantized_activations(graph):
        if exact:
            node.replace_all_uses_with(source)
        else:
            node.target, node.args = _straight_activation, (source, *node.args)
    if exact:
        for node in graph.calls(qcompile.pack_vectors.default):
            node.replace_all_uses_with(node.all_input_nodes[0])


def _straight_activation(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """What `qcompile::dequantize_activation` gives, with the gradient of x, which was quantized."""
    value: Tensor = qcompile.dequantize_activation(codes, scale, zero, group_size, dtype)
    return x + (value - x).detach()


def _quantized_activations(graph: Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Every dequantize of an activation that the graph quantizes, with the value that is quantized."""
    found = []
    for node in graph.calls(qcompile.dequantize_activation.default):
        maker = node.args[0]
        while isinstance(maker, fx.Node) and maker.target is operator.getitem:
            maker = maker.args[0]
        if isinstance(maker, fx.Node) and maker.target in _QUANTIZERS and isinstance(maker.args[0], fx.Node):
            found.append((node, maker.args[0]))
    return found
