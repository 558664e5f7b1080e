"""Nodes and constants that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Erase what no output depends on, and the constants that go with it."""

    name: ClassVar[str] = "remove-dead-code"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Backwards once, so that a dead chain goes in one run."""
        del ctx
        return graph.remove_dead() > 0
