"""The linears that read a space, as a search for scales sees them: weights, sampled inputs, and how the scheme rounds both."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from qcompile.ir.change_basis import is_carrier
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.selection import find_heads, matching_pattern
from qcompile.passes.space_channels import positions_of, read_linears, request_for
from qcompile.passes.spaces import Space, Value
from qcompile.passes.statistics import Request
from qcompile.quant import activations
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.format import QuantFormat
from qcompile.quant.reference import quantize, restore
from qcompile.quant.scale_search import Reader, Rounding

READER_ROWS = 512
"""Tokens on which the error of a linear is measured."""
STEADY_TOKENS = 8192
"""Means and moments over more would be nearly the same: unlike maxima, and unlike what weights are rounded against."""


def rounds(ctx: PassContext) -> bool:
    """Whether the scheme rounds weights at all."""
    return ctx.target.scheme.weight is not None


def is_rounded(graph: Graph, linear: fx.Node, ctx: PassContext) -> bool:
    """Whether a linear has a constant weight, is no head that stays in float, and is not to be ignored."""
    scheme = ctx.target.scheme
    if graph.constant(linear.args[1]) is None or (linear in find_heads(graph) and not scheme.quantize_head):
        return False
    name = str(linear.args[1].target)  # type: ignore[union-attr]
    return not is_carrier(name) and matching_pattern(name, scheme.ignore) is None


def rounded_linears(graph: Graph, space: Space, ctx: PassContext) -> list[tuple[fx.Node, Value]]:
    """The linears that read the space and whose operands the scheme rounds, each with the value that it reads."""
    return [(node, value) for node, value in read_linears(graph, space) if is_rounded(graph, node, ctx)]


def readers_of(graph: Graph, space: Space, measured: Mapping[Request, Tensor], ctx: PassContext) -> list[Reader]:
    """The readers among the linears whose weights the scheme rounds; `measured` holds a sample of what each reads."""
    scheme = ctx.target.scheme
    assert scheme.weight is not None
    found = []
    for node, value in rounded_linears(graph, space, ctx):
        inputs = measured[request_for(value, "sample", READER_ROWS)]
        weight = graph.constants[str(node.args[1].target)].materialize().float()  # type: ignore[union-attr]
        channels = positions_of(space, value.places, weight.shape[1])
        found.append(Reader(weight, inputs, channels, _weight_rounding(scheme.weight), _input_rounding(scheme.activation)))
    return found


def _weight_rounding(form: QuantFormat) -> Rounding:
    return lambda weight: restore(quantize(weight, form), form, weight.shape[1])


def _input_rounding(form: ActivationFormat | None) -> Rounding | None:
    if form is None:
        return None
    bits, size, element, clip = form.element.bits, form.granularity.group_size, form.element.kind, form.clip

    def rounded(x: Tensor) -> Tensor:
        rows = x.reshape(1, -1) if form.static else x  # static: all tokens share a scale
        if form.symmetric:
            codes, scale = activations.quantize(rows, bits, size, element, clip)
            return activations.dequantize(codes, scale, None, size, x.dtype).view(x.shape)
        return activations.dequantize(*activations.quantize_asymmetric(rows, bits, size, clip), size, x.dtype).view(x.shape)

    return rounded
