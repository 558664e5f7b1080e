"""Passes with one planted mistake each, for whatever has to find them: the check, bisection, blame.

They work on the graph of `tiny("llama")`. Each is a pass of the real pipeline that goes wrong in one place, which `place` names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qcompile.ir.constants import tensor_constant
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.rotate_hadamard import RotateHadamard


@dataclass(frozen=True)
class SkippingRotation(RotateHadamard):
    """Rotates the stream and the heads, and forgets the weight called `place`."""

    name: ClassVar[str] = "skipping-rotation"
    place: str = "model.layers.1.self_attn.q_proj.weight"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        forgotten = graph.constants[self.place]
        changed = super().run(graph, ctx)
        graph.bind(self.place, forgotten)
        return changed


@dataclass(frozen=True)
class WrongScale(QuantizeWeights):
    """Rounds weights, and makes the scales of the one called `place` `factor` times too large."""

    name: ClassVar[str] = "wrong-scale"
    place: str = "model.layers.1.mlp.up_proj.weight"
    factor: float = 3.0

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        changed = super().run(graph, ctx)
        scale = f"{self.place}.scale"
        if scale in graph.constants:
            right = graph.constants[scale]
            wrong = (right.materialize().float() * self.factor).to(right.dtype)
            graph.bind(scale, replace(tensor_constant(wrong), format=right.format))
        return changed


@dataclass(frozen=True)
class BrokenFusion(FuseResidualNorm):
    """Fuses residual adds with norms, and loses epsilon in number `place` of them (2 is behind the attention of layer 1)."""

    name: ClassVar[str] = "broken-fusion"
    place: int = 2

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        changed = super().run(graph, ctx)
        for node in graph.calls(torch.ops.qcompile.add_rms_norm.default)[self.place : self.place + 1]:
            x, residual, gain, _, *rest = node.args
            node.args = (x, residual, gain, 0.5, *rest)
        return changed


FAULTS: dict[str, type[Pass]] = {item.name: item for item in (SkippingRotation, WrongScale, BrokenFusion)}
