"""Tables of cache forms: what keys and values look like over the calibration data, and what their errors cost."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import PassContext
from qcompile.passes.outline import unknown
from qcompile.passes.statistics import Request
from qcompile.quant.vector_format import vector_format

aten = torch.ops.aten
_ROWS, _QUERY_ROWS = 8192, 1024
"""Tokens that tables are made from, and queries whose magnitudes say what counts."""
_VIEWS = (
    aten.transpose.int,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.contiguous.default,
    aten.view.default,
)
ATTEND_OPTIONS = ((5, "scale", 1.0), (7, "window", 0), (8, "softcap", 0.0), (9, "sinks", None))
"""What attention over a cache takes over from attention without one: place, name, default."""
_NOISE_ROWS = 1024
_UNUSUAL = 8.0
"""Tokens of so many times the median norm are attention sinks, which caches of few bits keep as they came: tables ignore them."""


@dataclass(frozen=True)
class CachedPair:
    """The keys and values [B, L, S, D] of one attention as they are stored, its queries [B, H, S, D], and the forms of both as text.

    Without forms they are stored as numbers.
    """

    attention: fx.Node
    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    forms: tuple[str, ...]
    before_positions: bool


def option(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument of a call by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def make_tables(graph: Graph, pairs: Sequence[CachedPair], ctx: PassContext) -> list[tuple[list[fx.Node], list[fx.Node]]]:
    """Constants for the keys and for the values of each pair; empty lists where a form has no tables.

    What is measured are new nodes that nobody reads; `graph.remove_dead` takes them away.

    Raises:
        SourceError: without calibration data where a form needs it.
    """
    wanted = [pair for pair in pairs if any(vector_format(form).tables for form in pair.forms)]
    if not wanted:
        return [([], []) for _ in pairs]
    if ctx.outlines("rewrite-kv-cache"):
        return [_outlined_tables(graph, index, pair) for index, pair in enumerate(pairs)]
    flat = {part: _flat(graph, pair.attention, part) for pair in wanted for part in (pair.keys, pair.values, pair.queries)}
    requests = {part: Request(node.name, "sample", _ROWS) for part, node in flat.items()}
    for pair in wanted:
        requests[pair.queries] = Request(flat[pair.queries].name, "sample", _QUERY_ROWS)
    measured = ctx.statistics(graph, list(requests.values()))
    made = {pair: _tables(graph, index, pair, requests, measured) for index, pair in enumerate(pairs) if pair in wanted}
    return [made.get(pair, ([], [])) for pair in pairs]


def _outlined_tables(graph: Graph, index: int, pair: CachedPair) -> tuple[list[fx.Node], list[fx.Node]]:
    """As `_tables`, without values."""
    found: list[list[fx.Node]] = []
    for name, part, form in zip(("keys", "values"), (pair.keys, pair.values), pair.forms, strict=True):
        shape = fake_value(part).shape
        labels = {f"cache.{index}.{name}.{label}": made for label, made in _table_forms(form, int(shape[1]), int(shape[3])).items()}
        found.append([graph.add_constant(label, unknown(label, *made), source=pair.attention) for label, made in labels.items()])
    return found[0], found[1]


@functools.cache
def _table_forms(form: str, heads: int, size: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each table of a form, from a calibration on noise."""
    kind = vector_format(form)
    noise = torch.randn(_NOISE_ROWS, heads, size, generator=torch.Generator().manual_seed(0))
    tables = kind.calibrate(noise, torch.ones(heads, size)) if kind.tables else ()
    return {label: (table.shape, table.dtype) for label, table in zip(kind.tables, tables, strict=True)}


def _flat(graph: Graph, before: fx.Node, part: fx.Node) -> fx.Node:
    """The heads of a token side by side [B, S, L·D], so that they are measured together."""
    turned = graph.insert(before, aten.transpose.int, (part, 1, 2), source=before)
    return graph.insert(before, aten.flatten.using_ints, (turned, 2), source=before)


def _tables(
    graph: Graph, index: int, pair: CachedPair, requests: Mapping[fx.Node, Request], measured: Mapping[Request, Tensor]
) -> tuple[list[fx.Node], list[fx.Node]]:  # fmt: skip
    heads, size = (int(length) for length in (fake_value(pair.keys).shape[1], fake_value(pair.keys).shape[3]))
    importance = {
        "keys": _wanted_by_queries(measured[requests[pair.queries]], heads, size, turning=pair.before_positions),
        "values": _read_by(graph, pair.attention, heads, int(fake_value(pair.values).shape[3])),
    }
    found: list[list[fx.Node]] = []
    for name, part, form in zip(("keys", "values"), (pair.keys, pair.values), pair.forms, strict=True):
        kind = vector_format(form)
        samples = _usual(measured[requests[part]]).view(-1, heads, int(fake_value(part).shape[3]))
        tables = kind.calibrate(samples, importance[name]) if kind.tables else ()
        found.append(
            [
                graph.add_constant(f"cache.{index}.{name}.{label}", table, source=pair.attention)
                for label, table in zip(kind.tables, tables, strict=True)
            ]
        )
    return found[0], found[1]


def _usual(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1)
    return rows[norms <= _UNUSUAL * norms.median()]


def _wanted_by_queries(queries: Tensor, heads: int, size: int, *, turning: bool) -> Tensor:
    """The mean square [L, D] of the queries [N, H·D] that meet each channel; positions mix the channels of a plane evenly."""
    squares = queries.view(len(queries), heads, -1, size).pow(2).mean(dim=(0, 2))
    if not turning:
        return squares
    low, high = squares.chunk(2, dim=-1)
    return torch.cat(((low + high) / 2,) * 2, dim=-1)


def _read_by(graph: Graph, attention: fx.Node, heads: int, size: int) -> Tensor:
    """The squared column norms [L, D] of the projection that reads the attention's heads; ones where none is found."""
    node: Any = attention
    while len(node.users) == 1 and next(iter(node.users)).target in _VIEWS:
        node = next(iter(node.users))
    readers = [user for user in node.users if user.target is aten.linear.default and user.args[0] is node]
    weight = graph.constant(readers[0].args[1]) if len(node.users) == 1 and readers else None
    if weight is None or weight.shape[1] % (heads * size):
        return torch.ones(heads, size)
    return weight.materialize().float().pow(2).sum(0).view(heads, -1, size).mean(1)
