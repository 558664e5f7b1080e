"""What linears and convolutions with quantized weights read is quantized too: a quantize and a dequantize in front of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcompile.errors import PipelineError
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.outline import unknown
from qcompile.passes.selection import find_sites, is_quantized
from qcompile.passes.statistics import Request
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.granularity import PER_CHANNEL
from qcompile.quant.static_range import METHODS, static_range

aten = torch.ops.aten
qcompile = torch.ops.qcompile
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
Readers = dict[tuple[fx.Node, ActivationFormat], list[fx.Node]]


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Put `dequantize_activation(quantize_activation(x))` where x meets a quantized weight; one pair per value and format.

    Static ranges come from the extremes and `samples` calibration tokens by `ranges` (`qcompile.quant.static_range`). Convolutions are
    always static and asymmetric: their channels are not the last axis, and what an activation function leaves is one-sided.
    """

    name: ClassVar[str] = "quantize-activations"
    exact: ClassVar[bool] = False
    ranges: str = "mse"
    percentile: float = 0.9999
    samples: int = 4096

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Before quantize-weights or after: what meets a weight that is quantized, or that the scheme wants quantized."""
        if self.ranges not in METHODS:
            raise PipelineError(f"pass {self.name}: option ranges: expected one of {', '.join(METHODS)}, got {self.ranges!r}")
        form = ctx.target.scheme.activation
        readers = {} if form is None else self._readers(graph, form, ctx)
        static = [request for value, chosen in readers if chosen.static for request in self._requests(value)]
        outlined = bool(static) and ctx.outlines(self.name)
        measured = ctx.statistics(graph, static) if static and not outlined else {}
        for (value, chosen), nodes in readers.items():
            if chosen.static and outlined:
                result = _static_pair(graph, value, nodes[0], chosen, *_unknown_range(value, chosen))
            elif chosen.static:
                sample = torch.cat([measured[request] for request in self._requests(value)])
                scale, zero = static_range(sample, chosen, self.ranges, self.percentile)
                parts = tensor_constant(scale), None if zero is None else tensor_constant(zero)
                result = _static_pair(graph, value, nodes[0], chosen, *parts)
            else:
                result = dynamic_pair(graph, value, nodes[0], chosen)
            for node in nodes:
                node.update_arg(0, result)
        return bool(readers)

    def _requests(self, value: fx.Node) -> list[Request]:
        """Tokens of a value and its extremes: rare as they are, a range that is chosen without them may cut off what counts most."""
        sample = Request(value.name, "sample", self.samples)
        return [sample] if self.ranges == "percentile" else [sample, Request(value.name, "range")]

    def _readers(self, graph: Graph, form: ActivationFormat, ctx: PassContext) -> Readers:
        """Value and format -> the nodes that are to read it quantized, in order."""
        found: Readers = {}
        # quantize-weights notes what it leaves alone, and spends fuel on what it does not.
        looking = replace(ctx, fuel=None, notes=[])
        ahead = {reader for site in find_sites(graph, looking, self.name) for reader in site.readers}
        for node in graph.calls(aten.linear.default, *_CONVOLUTIONS):
            if node not in ahead and not is_quantized(node.args[1]):
                continue
            value = node.args[0]
            assert isinstance(value, fx.Node)
            if value.target is qcompile.dequantize_activation.default:
                continue  # the model came with its activations quantized
            chosen = form
            if node.target in _CONVOLUTIONS:
                chosen = replace(form, granularity=PER_CHANNEL, static=True, symmetric=not form.element.is_integer)
                if ctx.calibration is None and not form.static:
                    ctx.note(self.name, node.name, "the range of its input is not known; give calibration=")
                    continue
            if (value, chosen) in found or ctx.spend():
                found.setdefault((value, chosen), []).append(node)
        return found


def dynamic_pair(graph: Graph, value: fx.Node, first: fx.Node, form: ActivationFormat) -> fx.Node:
    """Quantize `value` by ranges of its own, before the node `first`, and dequantize it: what readers may read in its place."""
    columns = int(fake_value(value).shape[-1])
    size = -1 if form.granularity.group_size == -1 or form.granularity.group_size >= columns else form.granularity.group_size
    bits, dtype = form.element.bits, fake_value(value).dtype
    if form.symmetric:
        args = (value, bits, size, form.element.kind, form.clip)
        made, count = graph.insert(first, qcompile.quantize_activation.default, args, source=value), 2
    else:
        made, count = graph.insert(first, qcompile.quantize_activation_asym.default, (value, bits, size, form.clip), source=value), 3
    parts = [graph.insert(first, operator.getitem, (made, index), source=value) for index in range(count)]
    codes, scale, zero = (*parts, None)[:3]
    return graph.insert(first, qcompile.dequantize_activation.default, (codes, scale, zero, size, dtype), source=value)


def _unknown_range(value: fx.Node, form: ActivationFormat) -> tuple[Constant, Constant | None]:
    """What `static_range` gives, for a plan."""
    return unknown(f"{value.name}.scale", (1,)), None if form.symmetric else unknown(f"{value.name}.zero", (1,), torch.int32)


def _static_pair(graph: Graph, value: fx.Node, first: fx.Node, form: ActivationFormat, scale: Constant, zero: Constant | None) -> fx.Node:
    parts = [
        None if part is None else graph.add_constant(f"{value.name}.{name}", part, source=value)
        for name, part in (("scale", scale), ("zero", zero))
    ]
    args = (value, *parts, form.element.bits, form.element.kind)
    codes = graph.insert(first, qcompile.quantize_static.default, args, source=value)
    return graph.insert(first, qcompile.dequantize_activation.default, (codes, *parts, -1, fake_value(value).dtype), source=value)
