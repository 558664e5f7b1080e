"""Which weights the scheme quantizes, and why the others are left alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qcompile.ir.branches import is_branch
from qcompile.ir.change_basis import is_carrier
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.sites import Site, make_site
from qcompile.quant.scheme import QuantScheme

aten = torch.ops.aten
qcompile = torch.ops.qcompile
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
_READERS = (aten.linear.default, aten.embedding.default, *_CONVOLUTIONS)
_FORWARD_ONLY = (
    aten.linear.default,
    aten.embedding.default,
    qcompile.attention.default,
    qcompile.cache_attend.default,
    qcompile.cache_attend_packed.default,
    qcompile.attend_settled.default,
    qcompile.attend_ranked.default,
    qcompile.attend_rematerialized.default,
    qcompile.attend_settled_sources.default,
    qcompile.moe_experts.default,
)


def find_sites(graph: Graph, ctx: PassContext, where: str, *, with_head: bool = False) -> list[Site]:
    """The weights that the scheme quantizes, each once, with all that read it; `where` is the pass that notes what it leaves alone.

    `with_head` adds the output head where it has a format of its own (`QuantScheme.head`), with the embedding that is the same matrix.
    """
    scheme = ctx.target.scheme
    if scheme.weight is None:
        return []
    readers: dict[str, list[fx.Node]] = {}
    heads, routers = find_heads(graph), find_routers(graph)
    own = _own_format(graph, scheme, heads) if with_head else set()
    for node in graph.calls(*_READERS, qcompile.moe_experts.default):
        chosen = _chosen(node, scheme, heads, routers, own)
        reason = chosen or _impossible(graph, node)
        if reason is not None:
            ctx.note(where, node.name, reason, chosen=chosen is not None)
        elif str(weight_operand(node).target) in readers or ctx.spend():
            readers.setdefault(str(weight_operand(node).target), []).append(node)
    sites = [make_site(graph, name, scheme.weight, nodes) for name, nodes in readers.items()]
    return [replace(site, form=scheme.head, rounding="nearest") if scheme.head and site.weight in own else site for site in sites]


def _own_format(graph: Graph, scheme: QuantScheme, heads: set[fx.Node]) -> set[str]:
    """The constants that have the format of the head."""
    if scheme.head is None or scheme.quantize_head:
        return set()
    return {str(weight_operand(node).target) for node in heads if graph.constant(weight_operand(node)) is not None}


def weight_operand(node: fx.Node) -> fx.Node:
    """The weight of an embedding (first argument), or of a linear or convolution (second)."""
    operand = node.args[0] if node.target is aten.embedding.default else node.args[1]
    assert isinstance(operand, fx.Node)
    return operand


def is_quantized(weight: object) -> bool:
    """Whether a weight operand is dequantized, perhaps unfolded to filters."""
    if isinstance(weight, fx.Node) and weight.target is aten.reshape.default:
        weight = weight.args[0]
    return isinstance(weight, fx.Node) and weight.target is qcompile.dequantize.default


def behind_cast(node: fx.Node) -> fx.Node:
    """What a cast casts; any other node itself."""
    source = node.args[0] if node.target is aten.to.dtype else node
    assert isinstance(source, fx.Node)
    return source


def _chosen(node: fx.Node, scheme: QuantScheme, heads: set[fx.Node], routers: set[fx.Node], own: set[str]) -> str | None:
    """Why the scheme or the user wants this node left alone, or None; `own` are the weights that have a format of their own."""
    if node.target is qcompile.moe_experts.default:
        return None
    if is_quantized(weight_operand(node)):
        return "its weight came quantized, and stays as it came"
    if is_branch(str(behind_cast(weight_operand(node)).target)):
        return "it is the high-precision side of a weight that is split"
    if is_carrier(str(behind_cast(weight_operand(node)).target)):
        return "it carries a change of basis that no weight could absorb"
    pattern = matching_pattern(str(weight_operand(node).target), scheme.ignore)
    if pattern is not None:
        return f"ignored by pattern {pattern!r}"
    at_an_end = "" if str(weight_operand(node).target) in own else _at_an_end(node, scheme, heads)
    if at_an_end:
        return at_an_end
    if node in routers:
        return "router gates stay in high precision"
    if node.target in _CONVOLUTIONS and scheme.weight is not None and scheme.weight.element.bits < 8:
        return "convolutions stay in high precision below 8 bits"
    return None


def _at_an_end(node: fx.Node, scheme: QuantScheme, heads: set[fx.Node]) -> str:
    """Why an embedding or a head is left alone; "" for any other node, or where the scheme wants it among the weights."""
    if node.target is aten.embedding.default and not scheme.quantize_embedding:
        return "embeddings stay in high precision (quantize_embedding=False)"
    if node in heads and not scheme.quantize_head:
        return "the output head stays in high precision (quantize_head=False)"
    return ""


def _impossible(graph: Graph, node: fx.Node) -> str | None:
    """Why this node cannot be quantized, or None if it can."""
    if node.target is qcompile.moe_experts.default:
        return "experts are matrices stacked in three dimensions; only linears, embeddings and convolutions are quantized"
    constant = graph.constant(weight_operand(node))
    if constant is None:
        return "its weight is computed, not a constant"
    if node.target not in _CONVOLUTIONS and len(constant.shape) != 2:
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
