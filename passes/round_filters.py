"""Filters of a convolution, rounded against the patches that they see.

A filter whose taps sum to about zero (an edge detector) turns rounding errors into a shift of its whole channel: they add up over an input
that is far from zero. Its bias can take such a shift back exactly (arXiv:1906.04721, section 4.2, with the mean measured), and then only
the input's covariance counts for the choice of levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from qcompile.ir.constants import uncast
from qcompile.ir.graph import Graph
from qcompile.passes.activation_pairs import arguments
from qcompile.passes.patches import patch_mean, patch_moments
from qcompile.passes.sites import Site
from qcompile.passes.stream import NodeInputs
from qcompile.quant.format import QuantFormat
from qcompile.quant.reference import Quantized, restore
from qcompile.quant.rounding.grouped_gptq import grouped_gptq

Rounding = Callable[[Tensor, Tensor, QuantFormat, str], Quantized]
"""Weight [N, K], second moment [K, K], format, name -> packed weight."""


def round_filters(graph: Graph, site: Site, inputs: NodeInputs, rounding: Rounding) -> tuple[Quantized, Tensor | None]:
    """The packed filters, and the bias [N] float32 that keeps the mean of what comes out; None where there is no bias to change.

    The mean is that of the reference graph, if `inputs` has one: what was rounded before has moved it too.
    `rounding` is used where all filters see the same channels, GPTQ for many small matrices where they do not.
    """
    weight, moments = site.constant.materialize().float(), patch_moments(inputs.node, inputs)
    bias = _own_bias(graph, site)
    second = moments.second if bias is None else moments.covariance()
    if len(second) == 1:
        rounded = rounding(weight, second[0], site.form, site.weight)
    else:
        rounded = grouped_gptq(weight, second, site.form, name=site.weight)
    if bias is None:
        return rounded, None
    wanted = moments.mean if inputs.reference is None else patch_mean(inputs.node, inputs.reference)
    means = (_means(each, mean) for each, mean in ((weight, wanted), (restore(rounded, site.form, weight.shape[1]), moments.mean)))
    return rounded, bias + next(means) - next(means)


def _means(weight: Tensor, mean: Tensor) -> Tensor:
    """Of what filters [N, K] give, [N], from the means of the patches [G, K] that each group sees."""
    return torch.bmm(weight.view(len(mean), -1, weight.shape[1]), mean.unsqueeze(2)).flatten()


def bias_name(node: fx.Node) -> str:
    """The constant that a convolution has as its bias."""
    return str(arguments(node)["bias"].target)


def _own_bias(graph: Graph, site: Site) -> Tensor | None:
    """The bias of the one convolution that reads the weight, if nothing else reads that bias."""
    bias = arguments(site.readers[0])["bias"]
    constant = graph.constant(bias)
    return uncast(constant).materialize().float() if constant is not None and owns_bias(graph, site) else None


def owns_bias(graph: Graph, site: Site) -> bool:
    """Whether one convolution reads the weight, and it alone its bias, which rounding may then change."""
    bias = arguments(site.readers[0])["bias"]
    if graph.constant(bias) is None or len(site.readers) > 1:
        return False
    return {user for node in graph.fx.find_nodes(op="get_attr", target=str(bias.target)) for user in node.users} == {site.readers[0]}
