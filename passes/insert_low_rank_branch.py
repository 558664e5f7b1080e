"""A small product in 16 bits absorbs what the quantizer would lose: `W = rest + left · right`, and only the rest is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import PipelineError
from qcompile.ir.branches import Subtract, branch_name
from qcompile.ir.constants import Cast, Constant, tensor_constant
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.branches import add_beside, branch_linear
from qcompile.passes.outline import unknown
from qcompile.passes.selection import find_sites, weight_operand
from qcompile.passes.sites import Site, is_linears_alone
from qcompile.passes.statistics import Request
from qcompile.passes.work import content_key
from qcompile.quant.low_rank import absorb_error, absorb_weight

aten = torch.ops.aten
ABSORB = ("error", "weight")


@dataclass(frozen=True)
class InsertLowRankBranch(Pass):
    """Put `linear(x, rest) + linear(linear(x, right), left)` for each linear whose weight the scheme quantizes.

    `absorb=weight` takes the largest directions of the weight itself (SVDQuant, arXiv:2411.05007): right where outliers set the scales.
    `absorb=error` takes those of what rounding loses (LoRC, arXiv:2303.08302), weighted by the second moment of the inputs where there is
    calibration data (arXiv:2402.02446). The branch is stored in the computation dtype, or float16 where that is float32.
    """

    name: ClassVar[str] = "insert-low-rank-branch"
    exact: ClassVar[bool] = True
    rank: int = 16
    absorb: str = "error"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Split every weight that linears alone read."""
        if self.rank < 1 or self.absorb not in ABSORB:
            raise PipelineError(
                f"pass {self.name}: expected rank of at least 1 and absorb as one of {', '.join(ABSORB)}, got rank={self.rank}, "
                f"absorb={self.absorb!r}"
            )
        sites = [site for site in find_sites(graph, ctx, self.name) if is_linears_alone(graph, site)]
        factors = self._outlined(sites, ctx) if ctx.outlines(self.name) else self._factors(graph, sites, ctx)
        for site in sites:
            _split(graph, site, *factors[site.weight])
        return bool(sites)

    def _factors(self, graph: Graph, sites: list[Site], ctx: PassContext) -> Mapping[str, tuple[Constant, Constant]]:
        """Left [N, R] and right [R, K] of every site; finished ones are kept like all work that takes long."""
        moments = self._moments(graph, sites, ctx)
        data = "" if ctx.calibration is None else ctx.calibration.key
        store = None if ctx.work is None else ctx.work.part(f"{self.spec} {content_key(graph)} {data}")
        found: dict[str, tuple[Constant, Constant]] = {}
        report = ctx.progress("low-rank branches")
        for done, site in enumerate(sites):
            known = None if store is None else store.get(site.weight)
            if known is None:
                tensors = dict(zip(("left", "right"), self._factor(site, ctx, moments), strict=True))
                known = store.put(site.weight, tensors) if store else {part: tensor_constant(tensor) for part, tensor in tensors.items()}
            found[site.weight] = known["left"], known["right"]
            if report is not None:
                report(done + 1, len(sites))
        return found

    def _outlined(self, sites: list[Site], ctx: PassContext) -> Mapping[str, tuple[Constant, Constant]]:
        """Factors of the same shapes without values."""
        found = {}
        for site in sites:
            (rows, columns), dtype = site.constant.shape, _stored(ctx)
            rank = min(self.rank, rows, columns)
            left = unknown(branch_name(site.weight, "low_rank_out"), (rows, rank), dtype)
            found[site.weight] = left, unknown(branch_name(site.weight, "low_rank_in"), (rank, columns), dtype)
        return found

    def _moments(self, graph: Graph, sites: list[Site], ctx: PassContext) -> Mapping[Request, Tensor]:
        if ctx.calibration is None or self.absorb == "weight" or not sites:
            return {}
        return ctx.statistics(graph, [_moment_of(site) for site in sites])

    def _factor(self, site: Site, ctx: PassContext, moments: Mapping[Request, Tensor]) -> tuple[Tensor, Tensor]:
        weight = site.constant.materialize().float()
        dtype = _stored(ctx)
        if self.absorb == "weight":
            left, right = absorb_weight(weight, self.rank)
        else:
            left, right = absorb_error(weight, site.form, self.rank, moments.get(_moment_of(site)), name=site.weight)
        return left.to(dtype).contiguous(), right.to(dtype).contiguous()


def _stored(ctx: PassContext) -> torch.dtype:
    return torch.float16 if ctx.target.compute == torch.float32 else ctx.target.compute


def _moment_of(site: Site) -> Request:
    read = site.readers[0].args[0]
    assert isinstance(read, fx.Node)
    return Request(read.name, "second_moment")


def _split(graph: Graph, site: Site, left: Constant, right: Constant) -> None:
    operand = weight_operand(site.readers[0])
    dtype = fake_value(operand).dtype
    rest = site.constant.then(Subtract(left, right))
    graph.bind(site.weight, rest if rest.dtype == dtype else rest.then(Cast(dtype)))
    inner = graph.add_constant(branch_name(site.weight, "low_rank_in"), right, source=operand)
    outer = graph.add_constant(branch_name(site.weight, "low_rank_out"), left, source=operand)
    for reader in site.readers:
        after = reader.next
        low = branch_linear(graph, reader.args[0], inner, reader, after)
        high = branch_linear(graph, low, outer, reader, after)
        add_beside(graph, reader, high)
