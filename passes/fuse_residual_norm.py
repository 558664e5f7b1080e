"""A residual add and the norm that reads it touch the same row: one operator, one trip through memory."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext

aten = torch.ops.aten
qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class FuseResidualNorm(Pass):
    """`rms_norm(x + residual)` becomes add_rms_norm, whose first result is the sum."""

    name: ClassVar[str] = "fuse-residual-norm"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Each sum that a norm reads; the sum's other readers use the fused operator's first result."""
        changed = False
        for norm in graph.calls(qcompile.rms_norm.default):
            total = norm.args[0]
            if not isinstance(total, fx.Node) or not _is_residual_add(total) or not ctx.spend():
                continue
            fused = graph.insert(total, qcompile.add_rms_norm.default, (*total.args[:2], *norm.args[1:]), source=norm)
            summed, normed = (graph.insert(total, operator.getitem, (fused, index), source=norm) for index in (0, 1))
            graph.replace(norm, normed)
            graph.replace(total, summed)
            changed = True
        return changed


def _is_residual_add(node: fx.Node) -> bool:
    """Two tensors of the sum's own shape and dtype, nothing broadcast or scaled."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    value = node.meta["val"]
    return all(
        isinstance(part, fx.Node)
        and part.meta["val"].dtype == value.dtype
        and list(map(str, part.meta["val"].shape)) == list(map(str, value.shape))
        for part in node.args
    )
