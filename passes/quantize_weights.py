"""Weights are rounded to the scheme's format; what is left alone is left alone for a reason that the coverage table shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from qcompile.errors import PipelineError
from qcompile.ir.constants import Cast, Constant, RoundedSource
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.round_filters import bias_name
from qcompile.passes.roundings import ROUNDINGS, parts_of
from qcompile.passes.selection import find_sites, weight_operand
from qcompile.passes.sites import BIAS, Parts, Site

aten = torch.ops.aten
qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Put `dequantize(codes, scale, zero)` where a linear, embedding or convolution reads a weight that the scheme quantizes."""

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False
    rounding: str = "nearest"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """One rounding per weight, however many nodes share it."""
        if self.rounding not in ROUNDINGS:
            raise PipelineError(f"pass {self.name}: option rounding: expected one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        sites = find_sites(graph, ctx, self.name, with_head=True)
        parts = parts_of(graph, sites, ctx, self.rounding) if sites else {}
        for site in sites:
            _read_packed(graph, site, parts[site.weight], site.rounding or self.rounding)
        graph.remove_dead()
        return bool(sites)


def _read_packed(graph: Graph, site: Site, constants: Parts, rounding: str) -> None:
    """Let the site's readers read a dequantize of the packed parts, and a convolution its filters unfolded again."""
    operand = weight_operand(site.readers[0])
    parts = {
        part: graph.add_constant(f"{site.weight}.{part}", _told(constants[part], site, rounding, part), source=operand)
        for part in site.form.parts
    }
    if BIAS in constants:
        name = bias_name(site.readers[0])
        graph.bind(name, constants[BIAS].then(Cast(graph.constants[name].dtype)))
    form, value = site.form, fake_value(operand)
    rows, columns = site.constant.shape
    size = -1 if form.granularity.group_size == -1 else form.granularity.size(columns)
    args: tuple[Any, ...] = (parts["codes"], parts["scale"], parts.get("zero"), form.element.bits, size, columns, value.dtype)
    if form.element.kind != "int" or "scale2" in parts:
        args = (*args, form.element.kind, parts.get("scale2"))
    node = graph.insert(site.readers[0], qcompile.dequantize.default, args, source=operand)
    if site.shape != (rows, columns):
        node = graph.insert(site.readers[0], aten.reshape.default, (node, list(site.shape)), source=operand, value=value)
    for reader in site.readers:
        reader.replace_input_with(operand, node)


def _told(constant: Constant, site: Site, rounding: str, part: str) -> Constant:
    """A part that was made before now, with what was done to its weight; one that is still to be rounded tells it by itself."""
    if isinstance(constant.source, RoundedSource):
        return constant
    return replace(constant, history=(*site.constant.log, f"quantize({site.form}, {rounding}).{part}"))
