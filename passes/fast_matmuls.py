"""Weight-only formats with fast matmuls: what meets an integer weight is rounded to int8 while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.graph import Graph
from qcompile.passes.activation_pairs import arguments
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.quantize_activations import dynamic_pair
from qcompile.passes.selection import is_quantized
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.element import INT8
from qcompile.quant.granularity import Granularity

aten = torch.ops.aten
qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class FastMatmuls(Pass):
    """Put `dequantize_activation(quantize_activation(x))` in front of every linear with an integer weight, int8 without zero points.

    Columns of a token share a scale as those of the weight do; `group_size` of them where a row of the weight has one scale. What is
    left to do is what any scheme with quantized activations does: `fuse-quantize-dequantize` makes integer matmuls of it. Other weights
    meet the floats, and are noted.
    """

    name: ClassVar[str] = "fast-matmuls"
    exact: ClassVar[bool] = False
    group_size: int = 32

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """After quantize-weights: nothing is chosen or rounded otherwise because activations will be. One pair per value and group."""
        readers: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for node in graph.calls(aten.linear.default):
            value, weight = node.args[:2]
            assert isinstance(value, fx.Node)
            assert isinstance(weight, fx.Node)
            if not is_quantized(weight) or value.target is qcompile.dequantize_activation.default:
                continue
            element = arguments(weight)["element"] if weight.target is qcompile.dequantize.default else None
            if element != "int":
                ctx.note(self.name, node.name, f"there is no integer matmul with {element or 'reshaped'} weights: it reads floats")
                continue
            size = arguments(weight)["group_size"]
            place = value, self.group_size if size == -1 else size
            if place in readers or ctx.spend():
                readers.setdefault(place, []).append(node)
        for (value, size), nodes in readers.items():
            pair = dynamic_pair(graph, value, nodes[0], ActivationFormat(INT8, Granularity(size)))
            for node in nodes:
                node.update_arg(0, pair)
        return bool(readers)
