"""Weight after weight is rounded against what really comes in: everything before it is rounded already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.collectors import SecondMoment
from qcompile.passes.patches import CONVOLUTIONS
from qcompile.passes.round_filters import Rounding, bias_name, round_filters
from qcompile.passes.sites import BIAS, RESIDUAL, Method, Parts, Site, marked, restored
from qcompile.passes.straight_through import straighten
from qcompile.passes.stream import NodeInputs, stream
from qcompile.passes.work import WorkStore, content_key
from qcompile.quant.format import QuantFormat
from qcompile.quant.reference import Quantized
from qcompile.quant.rounding.mse_clip import mse_clip


def round_sequentially(rounding: Rounding, label: str) -> Method:
    """A method that rounds weight after weight against the second moment of what comes in through the weights rounded before.

    `rounding` takes weight [N, K], second moment [K, K], format and name. Linears that read the same value are stacked: one
    second moment, one factorisation, one scale above them all where the format has one. Filters of a convolution are rounded group by
    group against the patches that they see; what they do to its mean, its bias makes up for (`passes/round_filters.py`). A weight that
    neither reads first (an embedding) is rounded alone, by the search for the scale of least error.
    """

    def run(graph: Graph, sites: Sequence[Site], ctx: PassContext) -> dict[str, Parts]:
        calibration = ctx.require_calibration(f"quantize-weights{{rounding={label}}}")
        forms = " ".join(f"{site.weight}:{site.form}" for site in sites)
        store = None
        if ctx.work is not None:
            store = ctx.work.part(f"quantize-weights {label} {content_key(graph)} {calibration.key} {forms}")
        walk = _Walk(graph, rounding, sites, store)
        visited = [site.readers[0] for site in sites]
        progress = ctx.progress(f"rounding weights ({label})")
        stream(graph, calibration, walk.visit, visited, reference=_exact(graph) if _has_filters(sites) else None, progress=progress)
        return walk.parts

    return run


def _has_filters(sites: Sequence[Site]) -> bool:
    return any(site.readers[0].target in CONVOLUTIONS for site in sites)


def _exact(graph: Graph) -> Graph:
    """A copy in which activations stay as they are; like the weights, which are not rounded in it."""
    copy = graph.clone()
    straighten(copy, exact=True)
    return copy


class _Walk:
    """Rounds sites in the order in which a stream reaches their first readers."""

    def __init__(self, graph: Graph, rounding: Rounding, sites: Sequence[Site], store: WorkStore | None) -> None:
        self.parts: dict[str, Parts] = {}
        self._graph, self._rounding, self._store = graph, rounding, store
        self._at = {site.readers[0]: site for site in sites}
        self._siblings: dict[tuple[fx.Node, QuantFormat], list[Site]] = {}
        for site in sites:
            if site.moment_reader is not None:
                self._siblings.setdefault(_sibling_key(site), []).append(site)

    def visit(self, node: fx.Node, inputs: NodeInputs) -> Mapping[str, Constant] | None:
        """Round the weight that `node` reads with all its siblings; what follows computes with the rounded ones."""
        site = self._at[node]
        if site.weight in self.parts:
            return None
        group = self._siblings[_sibling_key(site)] if site.moment_reader is not None else [site]
        if not self._recall(group):
            if node.target in CONVOLUTIONS:
                self._keep_filters(site, inputs)
            else:
                self._keep(group, self._round(group, inputs))
        changed = {one.weight: restored(one, self.parts[one.weight]) for one in group}
        bias = self.parts[site.weight].get(BIAS)
        return changed if bias is None else {**changed, bias_name(node): bias}

    def _round(self, group: Sequence[Site], inputs: NodeInputs) -> Quantized:
        site, name = group[0], ", ".join(site.weight for site in group)
        weight = torch.cat([site.constant.materialize().float() for site in group])
        if site.moment_reader is None:
            return mse_clip(weight, site.form, name=name)
        moment = SecondMoment(weight.shape[1], 0.0)
        for rows in inputs.rows():
            moment.add(rows)
        return self._rounding(weight, moment.result(), site.form, name)

    def _keep_filters(self, site: Site, inputs: NodeInputs) -> None:
        rounded, bias = round_filters(self._graph, site, inputs, self._rounding)
        tensors = {part: getattr(rounded, part) for part in site.form.parts}
        self._put(site, tensors if bias is None else {**tensors, BIAS: bias})

    def _recall(self, group: Sequence[Site]) -> bool:
        found = {site.weight: self._store.get(site.weight) for site in group} if self._store is not None else {}
        whole = {name: parts for name, parts in found.items() if parts is not None}
        if len(whole) < len(group):
            return False
        for site in group:
            self.parts[site.weight] = marked(whole[site.weight], site.form)
        return True

    def _keep(self, group: Sequence[Site], rounded: Quantized) -> None:
        first = 0
        for site in group:
            rows = slice(first, first + site.constant.shape[0])
            first = rows.stop
            tensors = {part: _rows(getattr(rounded, part), rows) for part in site.form.parts}
            if rounded.residual is not None:
                tensors[RESIDUAL] = rounded.residual[rows]
            self._put(site, tensors)

    def _put(self, site: Site, tensors: Mapping[str, Tensor]) -> None:
        kept = {part: tensor_constant(tensor) for part, tensor in tensors.items()}
        self.parts[site.weight] = marked(kept if self._store is None else self._store.put(site.weight, tensors), site.form)


def _sibling_key(site: Site) -> tuple[fx.Node, QuantFormat]:
    read = site.readers[0].args[0]
    assert isinstance(read, fx.Node)
    return read, site.form


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of a part; what all rows share stays whole."""
    return tensor if tensor.shape[0] == 1 else tensor[rows]
