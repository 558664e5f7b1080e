"""Batch normalization in evaluation is a factor and an offset per channel: the convolution or linear before it takes both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.constants import Cast, Constant, TensorSource, tensor_constant, widened
from qcompile.ir.folds import Scaled
from qcompile.ir.graph import Graph, operator_name
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.outline import unknown

aten = torch.ops.aten
PRODUCERS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.linear.default)


@dataclass(frozen=True)
class FoldBatchNorms(Pass):
    """`batch_norm(conv(x, W, b))` becomes `conv(x, f·W, f·(b - mean) + beta)`, `f = gamma / sqrt(variance + eps)` (arXiv:1712.05877)."""

    name: ClassVar[str] = "fold-batch-norms"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Every batch norm that alone reads a convolution or linear with weights of its own."""
        changed = False
        for node in graph.calls(aten.batch_norm.default):
            reason = _obstacle(graph, node, valueless=ctx.outline is not None)
            if reason is not None:
                ctx.note(self.name, node.name, reason)
            elif ctx.spend():
                _fold(graph, node)
                changed = True
        graph.remove_dead()
        return changed


def _obstacle(graph: Graph, node: fx.Node, *, valueless: bool) -> str | None:
    """Why this batch norm stays, or None."""
    producer: Any = node.args[0]
    if producer.target not in PRODUCERS:
        return f"it reads {operator_name(producer.target)}, expected a convolution or a linear"
    if len(producer.users) != 1:
        return f"{producer.name} is read by {len(producer.users)} nodes, expected by the batch norm alone"
    if bool(node.args[5]):
        return "it normalises by the batch it sees (training mode)"
    for place, item in (("weight", producer.args[1]), ("bias", _argument(producer, 2)), *zip(_PARTS, node.args[1:5], strict=True)):
        constant = graph.constant(item)
        if item is not None and (constant is None or not (valueless or constant.is_bound)):
            return f"its {place} is {'not a constant' if constant is None else 'a constant without a value'}"
    if len(producer.args[1].users) != 1:
        return f"the weight {producer.args[1].target} is read by others too"
    return None


_PARTS = ("gain", "offset", "mean", "variance")


def _argument(node: fx.Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get("bias")


def _fold(graph: Graph, node: fx.Node) -> None:
    producer: Any = node.args[0]
    weight = producer.args[1]
    name = str(weight.target)
    bias_name, dtype = name.removesuffix(".weight") + ".folded_bias", graph.constants[name].dtype
    new_bias = graph.add_constant(bias_name, _folded_bias(graph, node, bias_name, dtype), source=node)
    producer.args = (*producer.args[:2], new_bias, *producer.args[3:])
    producer.kwargs = {key: value for key, value in producer.kwargs.items() if key != "bias"}
    producer.meta["passes"] = tuple(dict.fromkeys((*producer.meta["passes"], *node.meta["passes"], graph.current_pass)))
    graph.replace(node, producer)


def _folded_bias(graph: Graph, node: fx.Node, name: str, dtype: torch.dtype) -> Constant:
    """The new bias; the weight takes the factor on the way. Without values neither is known, and the weight stays as it is."""
    producer: Any = node.args[0]
    taken = [graph.constant(item) for item in (*node.args[1:5], _argument(producer, 2))]
    if not all(constant is None or constant.is_bound for constant in taken):
        return unknown(name, graph.constants[str(producer.args[1].target)].shape[:1], dtype)
    gain, offset, mean, variance = (_wide(graph, item) for item in node.args[1:5])
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + float(node.args[7]))  # type: ignore[arg-type]
    if gain is not None:
        factor = factor * gain
    bias = _wide(graph, _argument(producer, 2))
    shifted = factor * (-mean if bias is None else bias - mean)
    weight = str(producer.args[1].target)
    graph.bind(weight, _scaled(graph.constants[weight], Scaled(0, tensor_constant(factor))))
    total = shifted if offset is None else shifted + offset
    return Constant(TensorSource(total), (Cast(dtype),), history=(f"bias and mean of {node.name}",))


def _scaled(constant: Constant, scale: Scaled) -> Constant:
    changed = constant.then(scale)
    return changed if changed.dtype == constant.dtype else changed.then(Cast(constant.dtype))


def _wide(graph: Graph, item: Any) -> Tensor | None:
    constant = graph.constant(item)
    return None if constant is None else widened(constant).materialize()
