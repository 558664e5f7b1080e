"""What depends on constants alone is computed at compile time."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.constants import Cast, Constant, TensorSource, uncast
from qcompile.ir.graph import Graph, is_effect, operator_name, real_tensors
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.canonicalize import one_linear
from qcompile.passes.outline import unknown


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace a call whose arguments are all constants by its value, where neither is larger than `limit` bytes.

    Large weights are left to their logs: materialising them here would undo their laziness.
    """

    name: ClassVar[str] = "fold-constants"
    limit: int = 1 << 22

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """In order, so that a chain folds in one run."""
        folded = [
            _fold(graph, node) for node in graph.nodes if self._foldable(graph, node, valueless=ctx.outline is not None) and ctx.spend()
        ]
        for user in dict.fromkeys(user for constant in folded for user in constant.users):
            one_linear(graph, user)  # its weight is a constant only now
        return bool(folded)

    def _foldable(self, graph: Graph, node: fx.Node, *, valueless: bool) -> bool:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or is_effect(node):
            return False
        if not all(isinstance(size, int) for size in value.shape) or value.nbytes > self.limit:
            return False
        constants = [graph.constant(used) for used in _made_by(node).all_input_nodes]
        # Packed weights are constants with a format: folded, they would be floats again.
        small = [item for item in constants if item is not None and item.format is None and item.nbytes <= self.limit]
        return len(small) == len(constants) and (valueless or all(item.is_bound for item in small))


def _made_by(node: fx.Node) -> fx.Node:
    """What computes a value: the node itself, or the call that it is one result of."""
    made = node.args[0] if node.target is operator.getitem else node
    return made if isinstance(made, fx.Node) and made.op == "call_function" else node


def _fold(graph: Graph, node: fx.Node) -> fx.Node:
    """The constant in place of a call."""
    name = f"folded.{node.name}"
    known = all(graph.constants[str(used.target)].is_bound for used in _made_by(node).all_input_nodes)
    constant = _computed(graph, node) if known else unknown(name, node.meta["val"].shape, node.meta["val"].dtype)
    folded = graph.add_constant(name, constant, source=node)
    graph.replace(node, folded)
    return folded


def _computed(graph: Graph, node: fx.Node) -> Constant:
    """Floats are computed in float64 and cast on reading, so that a graph moved to float64 loses nothing here."""

    def real(used: fx.Node) -> Any:
        tensor = uncast(graph.constants[str(used.target)]).materialize()
        return tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor

    def widen(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    made = _made_by(node)
    args, kwargs = fx.node.map_aggregate(fx.node.map_arg((made.args, made.kwargs), real), widen)
    with real_tensors():
        value = made.target(*args, **kwargs)  # type: ignore[operator]
    value = value if made is node else value[node.args[1]]
    history = (f"{operator_name(made.target)} of {', '.join(str(used.target) for used in made.all_input_nodes) or 'numbers'}",)
    constant = Constant(TensorSource(value.contiguous()), history=history)
    wanted = node.meta["val"].dtype
    return constant if value.dtype == wanted else constant.then(Cast(wanted))
