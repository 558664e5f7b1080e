"""What depends on constants alone is computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.constants import Cast, Constant, TensorSource, uncast
from qcompile.ir.graph import Graph, is_effect, operator_name, real_tensors
from qcompile.passes.base import Pass, PassContext


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace a call whose arguments are all constants by its value, where neither is larger than `limit` bytes.

    Large weights are left to their logs: materialising them here would undo their laziness.
    """

    name: ClassVar[str] = "fold-constants"
    limit: int = 1 << 22

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """In order, so that a chain folds in one run."""
        changed = False
        for node in graph.nodes:
            if self._foldable(graph, node) and ctx.spend():
                _fold(graph, node)
                changed = True
        return changed

    def _foldable(self, graph: Graph, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or is_effect(node):
            return False
        if not all(isinstance(size, int) for size in value.shape) or value.nbytes > self.limit:
            return False
        constants = [graph.constant(used) for used in node.all_input_nodes]
        # Packed weights are constants with a format: folded, they would be floats again.
        return all(item is not None and item.is_bound and item.format is None and item.nbytes <= self.limit for item in constants)


def _fold(graph: Graph, node: fx.Node) -> None:
    """Floats are computed in float64 and cast on reading, so that a graph moved to float64 loses nothing here."""

    def real(used: fx.Node) -> Any:
        tensor = uncast(graph.constants[str(used.target)]).materialize()
        return tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor

    def widen(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    args, kwargs = fx.node.map_aggregate(fx.node.map_arg((node.args, node.kwargs), real), widen)
    with real_tensors():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    history = (f"{operator_name(node.target)} of {', '.join(str(used.target) for used in node.all_input_nodes) or 'numbers'}",)
    constant = Constant(TensorSource(value.contiguous()), history=history)
    wanted = node.meta["val"].dtype
    graph.replace(
        node, graph.add_constant(f"folded.{node.name}", constant if value.dtype == wanted else constant.then(Cast(wanted)), source=node)
    )
