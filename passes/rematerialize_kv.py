"""Layers whose cache holds what keys and values are made from (XQuant, arXiv:2508.10395): where it is found, and when it saves bytes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import UnsupportedModelError
from qcompile.ir.graph import Graph, fake_value, real_tensors
from qcompile.ir.verify import where
from qcompile.passes.base import PassContext
from qcompile.passes.outline import Outline, unknown
from qcompile.passes.statistics import Request
from qcompile.quant.latents import shared_latent
from qcompile.quant.vector_format import vector_format
from qcompile.target import Target

aten = torch.ops.aten
qcompile = torch.ops.qcompile
_VIEWS = (
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.narrow.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.contiguous.default, operator.getitem,
)  # fmt: skip
_CONTEXT = 4096
"""Tokens of the sequence whose bytes are compared, as in the cache table."""


@dataclass(frozen=True)
class Projection:
    """A linear and which of its outputs [L, D] are the heads of an attention."""

    linear: fx.Node
    outputs: Tensor


@dataclass(frozen=True)
class Origin:
    """Where the keys and values of one attention come from.

    Attributes:
        attention: the node.
        value: x [B, S, K], what both projections read.
        keys: of the keys, before positions.
        values: of the values.
        turning: the rope that turns keys by their positions, None where there is none.
    """

    attention: fx.Node
    value: fx.Node
    keys: Projection
    values: Projection
    turning: fx.Node | None


@dataclass(frozen=True)
class Rematerialized:
    """What a layer caches in place of keys and values, as constants and nodes of the graph.

    Attributes:
        stored: x [B, S, K], or what is made from it, [B, S, r].
        weights: of keys and values [L·D, K or r].
        biases: the same [L·D], None where there are none.
        inv_freq: frequencies of positions, with `scaling`; None without rotary positions.
        scaling: of cosines and sines.
    """

    stored: fx.Node
    weights: tuple[fx.Node, fx.Node]
    biases: tuple[fx.Node | None, fx.Node | None]
    inv_freq: fx.Node | None
    scaling: float

    def on_read(self) -> dict[str, Any]:
        """What attend_rematerialized and attend_settled_sources take besides weights."""
        given = {name: bias for name, bias in zip(("k_bias", "v_bias"), self.biases, strict=True) if bias is not None}
        return given | ({} if self.inv_freq is None else {"inv_freq": self.inv_freq, "scaling": self.scaling})


def plan_rematerialized(graph: Graph, layers: Sequence[fx.Node], ctx: PassContext) -> list[Rematerialized | str]:
    """For each attention what it caches instead of keys and values, or why it is better off with these.

    What both are made from is cached as it is where that takes fewer bytes than both, else as a low-rank vector
    (`qcompile/quant/latents.py`) that does.

    Raises:
        UnsupportedModelError: naming the node that stands between a projection and its attention.
    """
    origins = [find_origin(graph, node) for node in layers]
    wide = [not _saves(origin, ctx.target, index, int(fake_value(origin.value).shape[-1])) for index, origin in enumerate(origins)]
    moments = _moments(graph, [origin for origin, is_wide in zip(origins, wide, strict=True) if is_wide], ctx)
    return [
        _latent(graph, origin, ctx, index, moments.get(origin.value)) if is_wide else _direct(graph, origin, index)
        for index, (origin, is_wide) in enumerate(zip(origins, wide, strict=True))
    ]


def find_origin(graph: Graph, attention: fx.Node) -> Origin:
    """What an attention's keys and values are made from.

    Raises:
        UnsupportedModelError: where anything but views and rotary positions stands between, or both are made from different values.
    """
    keys: Any = attention.args[1]
    turning = keys if keys.target is qcompile.rope.default else None
    if turning is not None:
        keys = turning.args[0]
        table = turning.args[1].args[0]
        if table.target is not qcompile.rotary_table.default:
            raise _refusal(attention, turning, "rotary positions from a table of frequencies")
    found = [_projection(graph, attention, part) for part in (keys, attention.args[2])]
    read = [_as_rows(projection.linear.args[0]) for projection in found]
    if read[0] is not read[1]:
        raise _refusal(attention, found[1].linear, f"keys and values made from the same value, {read[0]}")
    if fake_value(read[0]).dim() != 3:
        raise _refusal(attention, read[0], "a value [batch, sequence, channels]")
    return Origin(attention, read[0], found[0], found[1], turning)


def _refusal(attention: fx.Node, node: fx.Node, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"rewrite-kv-cache: {where(node)}: expected {expected} before {attention.name}, where keys and values are made anew on reading, "
        f"got {node.target if node.op == 'call_function' else node.name}; choose a cache of keys and values, such as kv4"
    )


def _as_rows(value: Any) -> fx.Node:
    """A value [B, S, K], also where it is read as [B·S, K]."""
    while value.target in (aten.reshape.default, aten.view.default) and fake_value(value).dim() == 2:
        before = value.args[0]
        if fake_value(before).shape[-1] != fake_value(value).shape[-1]:
            break
        value = before
    node: fx.Node = value
    return node


def _projection(graph: Graph, attention: fx.Node, part: Any) -> Projection:
    """The linear behind keys or values [B, L, S, D], through views alone."""
    views, node = [], part
    while node.target in _VIEWS:
        views.append(node)
        node = node.args[0]
    if node.target is not aten.linear.default or graph.constant(node.args[1]) is None:
        raise _refusal(attention, node, "a linear of constant weights, then views and rotary positions alone")
    value = fake_value(node)
    with real_tensors():
        outputs: Any = torch.arange(value.shape[-1]).view(*[1] * (value.dim() - 1), -1)  # of one token: sizes of batch and text are 1
        for view in reversed(views):
            args, kwargs = fx.node.map_arg((view.args[1:], view.kwargs), lambda size: 1)
            outputs = view.target(outputs, *args, **kwargs)
    heads = fake_value(part).shape
    if list(outputs.shape) != [1, heads[1], 1, heads[3]]:
        raise _refusal(attention, views[0], "views that leave every token its own")
    return Projection(node, outputs[0, :, 0])


def _saves(origin: Origin, target: Target, index: int, numbers: int) -> bool:
    """Whether so many numbers take fewer bytes than keys and values in the same cache, tokens in 16 bits included."""
    forms = target.scheme.cache.forms(index)
    packed = sum(
        part.outputs.shape[0] * _bytes(target, form, part.outputs.shape[1])
        for part, form in zip((origin.keys, origin.values), forms, strict=True)
    )
    return _bytes(target, forms[0], numbers) < packed


def _bytes(target: Target, form: str, numbers: int) -> int:
    """What vectors of so many numbers take in a sequence of `_CONTEXT` tokens: pages, and rows of those that are kept as they came."""
    return _CONTEXT * vector_format(form).width(numbers) + target.scheme.cache.retention.rows * numbers * target.cache_dtype.itemsize


def _moments(graph: Graph, origins: Sequence[Origin], ctx: PassContext) -> Mapping[fx.Node, Tensor]:
    """Second moments of what keys and values are made from; none without data."""
    if ctx.calibration is None or not origins or ctx.outlines("rewrite-kv-cache"):
        return {}
    requests = {origin.value: Request(origin.value.name, "second_moment") for origin in origins}
    measured = ctx.statistics(graph, requests.values())
    return {value: measured[request] for value, request in requests.items()}


def _direct(graph: Graph, origin: Origin, index: int) -> Rematerialized:
    """X itself."""
    parts = zip(("keys", "values"), (origin.keys, origin.values), strict=True)
    weights = [_rows_of(graph, origin, index, name, part, 1) for name, part in parts]
    assert weights[0] is not None
    assert weights[1] is not None
    return _made(graph, origin, index, origin.value, (weights[0], weights[1]))


def _latent(graph: Graph, origin: Origin, ctx: PassContext, index: int, moment: Tensor | None) -> Rematerialized | str:
    """A low-rank vector that both are made from."""
    target = ctx.target
    if ctx.outline is not None:
        return _outlined_latent(graph, origin, ctx.outline, target, index)
    read = [_materialized(graph, part.linear.args[1], part) for part in (origin.keys, origin.values)]
    latent = shared_latent(read[0], read[1], moment, vector_format(target.scheme.cache.forms(index)[0]))
    rank = len(latent.down)
    if not _saves(origin, target, index, rank):
        return f"keys and values are cached: what they are made from takes {rank} numbers, and no fewer bytes"
    names = zip(("down", "keys", "values"), (latent.down, latent.keys, latent.values), strict=True)
    down, keys, values = (graph.add_constant(f"cache.{index}.latent.{name}", part, source=origin.attention) for name, part in names)
    stored = graph.insert(origin.attention, aten.linear.default, (origin.value, down), source=origin.attention)
    return _made(graph, origin, index, stored, (keys, values))


def _outlined_latent(graph: Graph, origin: Origin, outline: Outline, target: Target, index: int) -> Rematerialized | str:
    """For a plan: the weights decide the rank, from all numbers (nothing is saved) down to the widest that saves bytes, and fewer."""
    rows = [len(part.outputs.flatten()) for part in (origin.keys, origin.values)]
    full = min(sum(rows), int(fake_value(origin.value).shape[-1]))
    rank = next((rank for rank in range(full, 0, -1) if _saves(origin, target, index, rank)), 0)
    what = "whether keys and values are made from a vector of few numbers"
    if not outline.choose("rewrite-kv-cache", what, "both are cached themselves", f"it has {rank} numbers") or not rank:
        return f"keys and values are cached: what they are made from takes {full} numbers, and no fewer bytes"
    names = [f"cache.{index}.latent.{name}" for name in ("down", "keys", "values")]
    shapes = ((rank, int(fake_value(origin.value).shape[-1])), (rows[0], rank), (rows[1], rank))
    nodes = [graph.add_constant(name, unknown(name, shape), source=origin.attention) for name, shape in zip(names, shapes, strict=True)]
    stored = graph.insert(origin.attention, aten.linear.default, (origin.value, nodes[0]), source=origin.attention)
    return _made(graph, origin, index, stored, (nodes[1], nodes[2]))


def _made(graph: Graph, origin: Origin, index: int, stored: fx.Node, weights: tuple[fx.Node, fx.Node]) -> Rematerialized:
    biases = [
        _rows_of(graph, origin, index, name, part, 2) for name, part in zip(("keys", "values"), (origin.keys, origin.values), strict=True)
    ]
    table: Any = None if origin.turning is None else origin.turning.args[1].args[0]  # type: ignore[union-attr]
    frequencies, scaling = (None, 1.0) if table is None else (table.args[1], table.args[2])
    return Rematerialized(stored, weights, (biases[0], biases[1]), frequencies, scaling)


def _rows_of(graph: Graph, origin: Origin, index: int, name: str, part: Projection, place: int) -> fx.Node | None:
    """The weight (argument 1) or bias (2) of a projection's heads: the constant itself where these are all of its outputs in order."""
    operand: Any = part.linear.args[place] if len(part.linear.args) > place else None
    if operand is None:
        return None
    if torch.equal(part.outputs.flatten(), torch.arange(int(fake_value(operand).shape[0]))):
        node: fx.Node = operand
        return node
    label = f"cache.{index}.{name}.{'weight' if place == 1 else 'bias'}"
    constant = graph.constant(operand)
    if constant is not None and not constant.is_bound:
        rows = unknown(label, (part.outputs.numel(), *constant.shape[1:]), constant.dtype)
        return graph.add_constant(label, rows, source=origin.attention)
    return graph.add_constant(label, _materialized(graph, operand, part), source=origin.attention)


def _materialized(graph: Graph, operand: Any, part: Projection) -> Tensor:
    constant = graph.constant(operand)
    assert constant is not None
    return constant.materialize()[part.outputs.flatten()]
