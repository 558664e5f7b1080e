"""The graph of a language model without its cache, in the form that every pass knows: one node per attention, positions as an input.

Each claim is checked by running the part of the graph that it is about; where one fails the graph stays a plain module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.frontend.onnx.language import INPUTS, OUTPUT
from qcompile.ir.graph import Graph
from qcompile.ir.structure import template_of
from qcompile.passes.attention_masks import paddings, visibility
from qcompile.passes.canonicalize import drop_nothing
from qcompile.passes.probing import Probe, UnknownValueError, behind
from qcompile.passes.raise_attention import group_heads, raise_attentions

aten = torch.ops.aten
attend = torch.ops.qcompile.attention.default

_LENGTHS = (1, 2, 9)
_MIXING = (
    aten.cumsum.default, aten.conv1d.default, aten.conv2d.default, aten.convolution.default, aten.flip.default, aten.roll.default,
    aten.sort.default, aten.cumprod.default,
)  # fmt: skip
"""Operators through which a token may see others; a product or a softmax over tokens is another such."""


def finish(graph: Graph, layers: int) -> str:
    """Give a graph of `language_model` the form of a causal language model, in place; `layers` is the number of pasts, 0 without.

    Returns:
        An empty text, or why it is none: the graph computes the same all the same.
    """
    for node in graph.calls(aten.cat.default):
        drop_nothing(graph, node)
    raise_attentions(graph)
    for node in graph.calls(attend):
        group_heads(graph, node)
    attentions = graph.calls(attend)
    if not attentions or (layers and len(attentions) != layers):
        return f"expected one attention for each of {layers or 'its'} layers, got {len(attentions)}"
    ids, mask, positions = graph.placeholders
    seen = [visibility(graph, node, mask) for node in attentions]
    for node, found in zip(attentions, seen, strict=True):
        if found is None or not found.causal:
            return f"{node.name} ({node.meta['source']}): expected causal attention, got {found or 'a mask that is none of those known'}"
    for node, found in zip(attentions, seen, strict=True):
        assert found is not None
        cap = node.args[8] if len(node.args) > 8 else 0.0
        node.args = (*node.args[:3], mask, None, node.args[5], True, found.window, cap, *node.args[9:])
    graph.remove_dead()
    if not positions.users:
        replace_positions(graph, mask, positions)
    reason = _leftover(graph, ids, mask, positions, mixing=not layers)
    if not reason:
        _be_language_model(graph)
    return reason


def replace_positions(graph: Graph, mask: fx.Node, positions: fx.Node) -> None:
    """Let the input `positions` [B, S] stand where the graph counts tokens, of the mask or of the sequence."""
    for node in reversed(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() != 2 or value.dtype not in (torch.int64, torch.int32):
            continue
        if counts_tokens(graph, node, mask):
            given = positions
            if value.dtype != torch.int64:
                given = graph.insert(node, aten.to.dtype, (positions, value.dtype), source=node)
            node.replace_all_uses_with(given)
    graph.remove_dead()
    _shapes_again(graph, positions)


def counts_tokens(graph: Graph, node: fx.Node, mask: fx.Node) -> bool:
    """Whether a value [B or 1, S] is the number of tokens before each token, by the mask, or of columns."""
    if any(used.op == "placeholder" and used is not mask and used.name != "input_ids" for used in behind(node)):
        return False
    symbols = [str(size) for size in mask.meta["val"].shape]
    by_mask = by_column = True
    for length in _LENGTHS:
        padding = paddings(length, anywhere=True)
        try:
            found = Probe(graph, dict(zip(symbols, padding.shape, strict=True)), {mask: padding}).value(node)
        except UnknownValueError:
            return False
        if found.shape[-1] != length or found.shape[0] not in (1, padding.shape[0]):
            return False
        counted = (padding.cumsum(-1) - 1).expand_as(padding)
        by_mask = by_mask and not bool(((found != counted) & (padding != 0)).any())
        by_column = by_column and bool((found == torch.arange(length)).all())
    return by_mask or by_column


def _shapes_again(graph: Graph, start: fx.Node) -> None:
    """Fake values behind `start`: a row of positions for each sequence may stand where one served all."""
    changed = {start}
    for node in graph.fx.nodes:
        if node.op != "call_function" or not changed.intersection(node.all_input_nodes):
            continue
        before, value = node.meta["val"], graph.infer(node)
        if str(getattr(before, "shape", before)) != str(getattr(value, "shape", value)) or not isinstance(value, Tensor):
            node.meta["val"] = value
            changed.add(node)


def _leftover(graph: Graph, ids: fx.Node, mask: fx.Node, positions: fx.Node, *, mixing: bool) -> str:
    """What would be wrong for a token that comes alone: places in the sequence that are no input, the mask, other tokens."""
    used = next((user for user in mask.users if user.target not in (attend, aten.sym_size.int)), None)
    if used is not None:
        return f"{used.name} ({used.meta['source']}): expected attention_mask to be read by attention alone, got {used.target}"
    length = str(ids.meta["val"].shape[1])
    told = {ids, positions}
    for node in graph.fx.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or isinstance(value, torch.SymInt):
            continue
        if told.intersection(_tensors(node)):
            told.add(node)
        elif any(length in str(size) for size in getattr(value, "shape", ())):
            return f"{node.name} ({node.meta['source']}): expected positions to come from position_ids, got {node.target} over the sequence"
        if mixing and _mixes(node, length):
            return f"{node.name} ({node.meta['source']}): expected tokens to see each other in attention alone, got {node.target}"
    return ""


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [used for used in node.all_input_nodes if not isinstance(used.meta.get("val"), torch.SymInt)]


def _mixes(node: fx.Node, length: str) -> bool:
    """Whether an operator computes along the axis of tokens."""
    target: Any = node.target
    first = node.args[0].meta["val"] if node.args and isinstance(node.args[0], fx.Node) else None
    if target in _MIXING:
        return True
    if not isinstance(first, Tensor):
        return False
    if target in (aten.matmul.default, aten.bmm.default):
        return length in str(first.shape[-1])
    axes = node.args[1] if len(node.args) > 1 else None
    if target in (aten.softmax.int, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default):
        listed = axes if isinstance(axes, list | tuple) else [axes]
        return any(isinstance(axis, int) and length in str(first.shape[axis]) for axis in listed)
    return False


def _be_language_model(graph: Graph) -> None:
    """The interface that other front ends give."""
    interface = graph.interface
    interface.kind = "causal_lm"
    interface.outputs = template_of({OUTPUT: graph.output.args[0][0]})[0]  # type: ignore[index]
    ids = interface.examples[INPUTS[0]]
    mask = torch.ones_like(ids)
    # Padding before the first row: a pass that loses the mask is found by the numeric check.
    mask[0, : mask.shape[1] // 3] = 0
    interface.examples |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
