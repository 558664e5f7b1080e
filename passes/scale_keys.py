"""Outlier channels of keys are scaled down and those of queries up, so that a cache of few bits holds keys of even range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.errors import PipelineError
from qcompile.ir.basis import Diagonal
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.space_channels import block_map, is_flat, request_for, value_magnitudes
from qcompile.passes.spaces import Kind, Space, Value, apply_basis_change, find_spaces
from qcompile.quant.scale_search import floored, normalized

qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class ScaleKeys(Pass):
    """SmoothAttention (QServe, arXiv:2405.04532): keys divided and queries multiplied by `max|k|^alpha`, per head and channel.

    Where positions are rotary both channels of a plane share the larger maximum; query and key projections (or the gains of query and
    key norms) absorb the scales.
    """

    name: ClassVar[str] = "scale-keys"
    alpha: float = 0.5

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """One diagonal for each attention's keys."""
        if not 0 < self.alpha <= 1:
            raise PipelineError(f"pass {self.name}: option alpha: expected a number above 0 and at most 1, got {self.alpha:g}")
        found = dict(self._key_spaces(graph, ctx))
        if not found or ctx.outlines(self.name):
            return False
        measured = ctx.statistics(graph, [request_for(value, "absmax") for value in found.values()])
        changed = False
        for space, value in found.items():
            if ctx.spend():
                scale = normalized(floored(value_magnitudes(space, value, measured, "absmax")) ** self.alpha)
                apply_basis_change(graph, space, block_map(space, Diagonal, scale if value.places[0].contravariant else 1 / scale), ctx)
                changed = True
        return changed

    def _key_spaces(self, graph: Graph, ctx: PassContext) -> Iterator[tuple[Space, Value]]:
        """Each space that keys live in, with a value that shows its channels on the keys' side along one axis."""
        spaces = find_spaces(graph, Kind.DIAGONAL)
        for node, keys in _stored_keys(graph):
            homes = [(space, value) for space in spaces for value in space.values if value.node is keys]
            shown = [(space, _flat_side(space, value.places[0].contravariant)) for space, value in homes]
            if not any(value is not None for _, value in shown):
                ctx.note(self.name, f"keys of {node.name}", "no scale passes between them and what makes them", chosen=True)
            yield from ((space, value) for space, value in shown if value is not None)


def _flat_side(space: Space, contravariant: bool) -> Value | None:
    """The last value whose channels of one side (keys, not queries) lie along one axis, with only these."""
    sides = [
        Value(value.node, value.axis, tuple(place for place in value.places if place.contravariant == contravariant))
        for value in space.values
    ]
    flat = [value for value in sides if value.places and is_flat(value.places)]
    return flat[-1] if flat else None


def _stored_keys(graph: Graph) -> Sequence[tuple[fx.Node, object]]:
    """Each attention, or append to a cache, and the keys that it is given."""
    places: dict[Any, int] = {qcompile.attention.default: 1, qcompile.cache_append.default: 2}
    return [(node, node.args[places[node.target]]) for node in graph.calls(*places)]
