"""Graph surgery that the passes share which split a weight in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.graph import Graph, fake_value

aten = torch.ops.aten


def branch_linear(graph: Graph, x: Any, weight: fx.Node, beside: fx.Node, before: fx.Node) -> fx.Node:
    """`linear(x, weight)` before a node; the weight, stored in 16 bits, is widened where the linear beside it computes in more."""
    dtype = fake_value(beside).dtype
    operand = weight if fake_value(weight).dtype == dtype else graph.insert(before, aten.to.dtype, (weight, dtype), source=weight)
    return graph.insert(before, aten.linear.default, (x, operand), source=beside)


def add_beside(graph: Graph, node: fx.Node, branch: fx.Node) -> None:
    """Whatever reads `node` reads its sum with `branch`, which stands after it."""
    total = graph.insert(branch.next, aten.add.Tensor, (node, branch), source=node)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
