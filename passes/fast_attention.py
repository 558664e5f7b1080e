"""Attention over packed caches with fast products: what meets codes has 16 bits while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext

qcompile = torch.ops.qcompile
READERS = (qcompile.cache_attend_packed.default, qcompile.attend_settled.default)


@dataclass(frozen=True)
class FastAttention(Pass):
    """Let kernels round what codes of a cache are multiplied with to 16 bits: a query by scales of keys, weights by scales of values.

    The operator's definition stays what it is, and so does the reference. A kernel that sums integers takes two products in place of three;
    half a unit is at most 2^-14.9 of the largest number beside it, where codes of 4 bits are off by 2^-5 of theirs. Others change nothing.
    """

    name: ClassVar[str] = "fast-attention"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Each attention by itself."""
        changed = False
        for node in graph.calls(*READERS):
            if ctx.spend():
                node.update_kwarg("products", "fast")
                changed = True
        return changed
