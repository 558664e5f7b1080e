"""Input columns that spoil their group stay in 16 bits, as a small matmul over the channels selected by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import PipelineError
from qcompile.ir.branches import ClearColumns, TakeColumns, branch_name
from qcompile.ir.constants import Cast, Constant, tensor_constant
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.branches import add_beside, branch_linear
from qcompile.passes.outline import unknown
from qcompile.passes.selection import find_sites, weight_operand
from qcompile.passes.sites import Site, is_linears_alone
from qcompile.passes.statistics import Request

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Put `linear(x, W without columns) + linear(x[columns], W of columns)` for each linear whose weight the scheme quantizes.

    LLM.int8() (arXiv:2208.07339). Linears that read the same value split off the same `columns` columns: those of largest activation where
    activations are quantized (and these are cleared from what is quantized); else those of most energy, weighted by the second moment of
    the inputs where there is calibration data. Not exact: they are stored in the computation dtype, or float16 where that is float32.
    """

    name: ClassVar[str] = "split-outliers"
    exact: ClassVar[bool] = False
    columns: int = 8

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Split the linears of each value together."""
        if self.columns < 1:
            raise PipelineError(f"pass {self.name}: option columns: expected at least 1, got {self.columns}")
        groups: dict[fx.Node, list[Site]] = {}
        for site in find_sites(graph, ctx, self.name):
            read = {node.args[0] for node in site.readers}
            width = site.constant.shape[-1]
            if not is_linears_alone(graph, site) or len(read) > 1:
                ctx.note(self.name, site.readers[0].name, "its weight is read in several places")
            elif width <= self.columns:
                ctx.note(self.name, site.readers[0].name, f"it has {width} columns, not more than are to be split off")
            else:
                groups.setdefault(read.pop(), []).append(site)  # type: ignore[arg-type]
        if ctx.outlines(self.name):
            chosen = {value: unknown(f"{value.name}.outlier_columns", (self.columns,), torch.int32) for value in groups}
        else:
            scores = _activation_scores(graph, list(groups), ctx)
            clears = ctx.target.scheme.activation is not None
            found = {value: _worst(sites, scores.get(value), self.columns, clears=clears) for value, sites in groups.items()}
            chosen = {value: tensor_constant(index) for value, index in found.items()}
        for value, sites in groups.items():
            _split(graph, value, sites, chosen[value], ctx)
        return bool(groups)


def _activation_scores(graph: Graph, values: Sequence[fx.Node], ctx: PassContext) -> Mapping[fx.Node, Tensor]:
    """How large each channel gets [K], or its mean square where the activations are not quantized; nothing without data."""
    if not values or (ctx.calibration is None and ctx.target.scheme.activation is None):
        return {}
    kind = "second_moment" if ctx.target.scheme.activation is None else "absmax"
    requests = {value: Request(value.name, kind) for value in values}
    measured = ctx.statistics(graph, requests.values())
    found = {value: measured[request] for value, request in requests.items()}
    return found if kind == "absmax" else {value: moment.diagonal() for value, moment in found.items()}


def _worst(sites: Sequence[Site], score: Tensor | None, columns: int, *, clears: bool) -> Tensor:
    """The columns to split off, ascending, as int32."""
    if not clears:
        score = torch.stack([_energy(site, score) for site in sites]).sum(0)
    assert score is not None
    return score.topk(columns).indices.sort().values.to(torch.int32)


def _energy(site: Site, mean_square: Tensor | None) -> Tensor:
    """What each column [K] adds to the outputs, in the mean square.

    Not what it loses by rounding: a column of outliers is rounded well itself and spoils the scales of the others.
    """
    energy = site.constant.materialize().float().square().sum(0)
    return energy if mean_square is None else energy * mean_square


def _split(graph: Graph, value: fx.Node, sites: Sequence[Site], chosen: Constant, ctx: PassContext) -> None:
    name = sites[0].weight
    first = min((reader for site in sites for reader in site.readers), key=graph.nodes.index)
    place = graph.add_constant(branch_name(name, "outlier_columns"), chosen, source=value)
    taken = graph.insert(first, aten.index_select.default, (value, -1, place), source=value)
    kept = _cleared(graph, value, name, chosen, first) if ctx.target.scheme.activation is not None else value
    stored = torch.float16 if ctx.target.compute == torch.float32 else ctx.target.compute
    for site in sites:
        dtype = fake_value(weight_operand(site.readers[0])).dtype
        outer = _column_constant(graph, site, chosen, stored)
        graph.bind(site.weight, _cast(site.constant.then(ClearColumns(chosen)), dtype))
        for reader in site.readers:
            add_beside(graph, reader, branch_linear(graph, taken, outer, reader, reader.next))
            reader.replace_input_with(value, kept)


def _column_constant(graph: Graph, site: Site, index: Constant, dtype: torch.dtype) -> fx.Node:
    name, taken = branch_name(site.weight, "outliers"), site.constant.then(TakeColumns(index))
    columns = tensor_constant(taken.materialize().to(dtype)) if index.is_bound else unknown(name, taken.shape, dtype)
    return graph.add_constant(name, columns, source=weight_operand(site.readers[0]))


def _cleared(graph: Graph, value: fx.Node, name: str, index: Constant, before: fx.Node) -> fx.Node:
    """The value without the channels that go the other way, so that they set no scale."""
    like, label = fake_value(value), branch_name(name, "kept_columns")
    keep = unknown(label, like.shape[-1:], like.dtype)
    if index.is_bound:
        keep = tensor_constant(torch.ones(int(like.shape[-1]), dtype=like.dtype).index_fill(0, index.materialize().long(), 0))
    mask = graph.add_constant(label, keep, source=value)
    return graph.insert(before, aten.mul.Tensor, (value, mask), source=value)


def _cast(constant: Constant, dtype: torch.dtype) -> Constant:
    return constant if constant.dtype == dtype else constant.then(Cast(dtype))
