"""A dequantize moves into the operator that reads it, so that the float weight never exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.ir.graph import Graph, operator_name
from qcompile.passes.base import Pass, PassContext

aten = torch.ops.aten
qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class FuseDequantize(Pass):
    """`linear(x, dequantize(W))` becomes quantized_linear, `embedding(dequantize(W), i)` quantized_embedding."""

    name: ClassVar[str] = "fuse-dequantize"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Every reader that can take codes does; others keep the dequantize and are noted."""
        changed = False
        for dequantize in graph.calls(qcompile.dequantize.default):
            codes, scale, zero, bits, group_size, columns, dtype, *form = dequantize.args
            for user in list(dequantize.users):
                if user.target is aten.linear.default and user.args[1] is dequantize and ctx.spend():
                    bias = user.args[2] if len(user.args) > 2 else None
                    fused = graph.insert(
                        user,
                        qcompile.quantized_linear.default,
                        (user.args[0], codes, scale, zero, bias, bits, group_size, *form),
                        source=user,
                    )
                elif user.target is aten.embedding.default and user.args[0] is dequantize and ctx.spend():
                    arguments = (user.args[1], codes, scale, zero, bits, group_size, columns, dtype, *form)
                    fused = graph.insert(user, qcompile.quantized_embedding.default, arguments, source=user)
                else:
                    ctx.note(self.name, user.name, f"{operator_name(user.target)} cannot read packed weights; {dequantize.name} stays")
                    continue
                fused.meta["passes"] = (
                    *fused.meta["passes"][:-1],
                    *(name for name in dequantize.meta["passes"] if name not in fused.meta["passes"]),
                    self.name,
                )
                graph.replace(user, fused)
                changed = True
        return bool(graph.remove_dead()) or changed
