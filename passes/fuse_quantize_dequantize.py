"""Quantized activations end in integer or float8 matmuls, and begin where their values are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.ir.graph import Graph
from qcompile.passes.activation_pairs import PRODUCERS, cancel, move_down
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.integer_matmuls import MATMULS, fuse_matmul, refusal, why_kept
from qcompile.passes.quantizing_producers import fuse_producer

qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class FuseQuantizeDequantize(Pass):
    """`linear(dequantize(x), dequantize(W))` becomes integer_linear or float8_linear, a convolution integer_conv2d: scales come last.

    A dequantize first moves through what only moves elements, and pairs that undo each other go. Then norm, residual sum, gated
    activation and rotation before a quantize become one operator with it. What stays apart is noted with the reason.
    """

    name: ClassVar[str] = "fuse-quantize-dequantize"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Before fuse-dequantize, which would take the weights; after fuse-residual-norm, whose sums fuse with their norm."""
        changed = False
        while any(move_down(graph, node, ctx.spend) for node in graph.calls(qcompile.dequantize_activation.default)):
            changed = True
        for quantize in graph.calls(*PRODUCERS):
            changed |= cancel(graph, quantize, ctx.spend)
        for node in graph.calls(*MATMULS):
            if not refusal(node) and ctx.spend():
                fuse_matmul(graph, node)
                changed = True
        changed |= graph.remove_dead() > 0
        for quantize in graph.calls(*PRODUCERS):
            reason = fuse_producer(graph, quantize, ctx.spend)
            changed |= reason == ""
            if reason:
                ctx.note(self.name, quantize.name, reason, chosen=True)
        for dequantize in graph.calls(qcompile.dequantize_activation.default):
            ctx.note(self.name, dequantize.name, why_kept(dequantize))
        return changed
