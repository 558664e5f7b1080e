"""Weights are rounded to the scheme's format; what is left alone is left alone for a reason that the coverage table shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import PipelineError
from qcompile.ir.constants import rounded_constants, uncast
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.quant.scheme import QuantFormat, QuantScheme

aten = torch.ops.aten
qcompile = torch.ops.qcompile
ROUNDINGS = ("nearest",)
_FORWARD_ONLY = (
    aten.linear.default,
    aten.embedding.default,
    qcompile.attention.default,
    qcompile.cache_attend.default,
    qcompile.moe_experts.default,
)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Put `dequantize(codes, scale, zero)` where a linear or embedding reads a weight that the scheme quantizes."""

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False
    rounding: str = "nearest"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """One rounding per weight, however many linears share it."""
        if self.rounding not in ROUNDINGS:
            raise PipelineError(f"pass {self.name}: option rounding: expected one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        form = ctx.target.scheme.weight
        if form is None:
            return False
        heads, routers = find_heads(graph), find_routers(graph)
        rounded: dict[str, fx.Node] = {}
        for node in graph.calls(aten.linear.default, aten.embedding.default, qcompile.moe_experts.default):
            chosen = _chosen(node, ctx.target.scheme, heads, routers)
            reason = chosen or _impossible(graph, node)
            if reason is not None:
                ctx.note(self.name, node.name, reason, chosen=chosen is not None)
            elif ctx.spend():
                _quantize_operand(graph, node, form, rounded)
        graph.remove_dead()
        return bool(rounded)


def weight_operand(node: fx.Node) -> fx.Node:
    """The weight of a linear (second argument) or an embedding (first)."""
    operand = node.args[1] if node.target is aten.linear.default else node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _chosen(node: fx.Node, scheme: QuantScheme, heads: set[fx.Node], routers: set[fx.Node]) -> str | None:
    """Why the scheme or the user wants this node left alone, or None."""
    if node.target is qcompile.moe_experts.default:
        return None
    pattern = matching_pattern(str(weight_operand(node).target), scheme.ignore)
    if pattern is not None:
        return f"ignored by pattern {pattern!r}"
    if node.target is aten.embedding.default and not scheme.quantize_embedding:
        return "embeddings stay in high precision (quantize_embedding=False)"
    if node in heads and not scheme.quantize_head:
        return "the output head stays in high precision (quantize_head=False)"
    if node in routers:
        return "router gates stay in high precision"
    return None


def _impossible(graph: Graph, node: fx.Node) -> str | None:
    """Why this node cannot be quantized, or None if it can."""
    if node.target is qcompile.moe_experts.default:
        return "experts are matrices stacked in three dimensions; only linears and embeddings are quantized"
    constant = graph.constant(weight_operand(node))
    if constant is None:
        return "its weight is computed, not a constant"
    if len(constant.shape) != 2:
        return f"its weight has {len(constant.shape)} dimensions, expected 2"
    return None


def matching_pattern(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first of `patterns` that covers the weight `name`: a dotted suffix of its module's name, or `re:` and an expression."""
    module = name.removesuffix(".weight")
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.search(pattern[3:], name):
                return pattern
        elif pattern in (name, module) or module.endswith("." + pattern):
            return pattern
    return None


def _quantize_operand(graph: Graph, node: fx.Node, form: QuantFormat, rounded: dict[str, fx.Node]) -> None:
    operand = weight_operand(node)
    name = str(operand.target)
    if name not in rounded:
        rounded[name] = _dequantize_node(graph, operand, form)
    node.replace_input_with(operand, rounded[name])


def _dequantize_node(graph: Graph, operand: fx.Node, form: QuantFormat) -> fx.Node:
    name = str(operand.target)
    constant = uncast(graph.constants[name])
    parts = {
        part: graph.add_constant(f"{name}.{part}", value, source=operand) for part, value in rounded_constants(constant, form, name).items()
    }
    first = min(operand.users, key=graph.nodes.index)
    columns = constant.shape[1]
    size = -1 if form.granularity.group_size == -1 else form.granularity.size(columns)
    value: Tensor = operand.meta["val"]
    args = (parts["codes"], parts["scale"], parts.get("zero"), form.element.bits, size, columns, value.dtype)
    return graph.insert(first, qcompile.dequantize.default, args, source=operand, value=value)


def find_heads(graph: Graph) -> set[fx.Node]:
    """Linears whose results reach a language model's logits through elementwise operators alone."""
    if graph.interface.kind not in ("causal_lm", "cached_lm"):
        return set()
    logits: Any = graph.output.args[0]
    return _first_linears([logits[0]], beyond=_FORWARD_ONLY)


def find_routers(graph: Graph) -> set[fx.Node]:
    """Linears whose results decide which expert a token goes to."""
    return _first_linears([experts.args[1] for experts in graph.calls(qcompile.moe_experts.default)])


def _first_linears(starts: list[Any], beyond: tuple[Any, ...] = ()) -> set[fx.Node]:
    """The nearest linears behind `starts`, not looking through operators in `beyond`."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, fx.Node) or node.op != "call_function":
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.add(node)
        elif node.target not in beyond:
            pending += node.all_input_nodes
    return found
