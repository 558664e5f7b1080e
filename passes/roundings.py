"""The ways to round weights, by the name that `rounding=` takes."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.ir.constants import LAZY_METHODS, rounded_constants
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.learn_rounding import Learning, learned
from qcompile.passes.outline import unknown
from qcompile.passes.patches import CONVOLUTIONS
from qcompile.passes.round_filters import owns_bias
from qcompile.passes.round_sequentially import round_sequentially
from qcompile.passes.sites import BIAS, Method, Parts, Site
from qcompile.quant.reference import part_dtype, part_shape
from qcompile.quant.rounding.gptq import gptq


def round_alone(method: str) -> Method:
    """A method that looks at each weight alone, when the weight is asked for."""

    def run(graph: Graph, sites: Sequence[Site], ctx: PassContext) -> dict[str, Parts]:
        del graph, ctx
        return {site.weight: rounded_constants(site.constant, site.form, site.weight, method) for site in sites}

    return run


_GPTQ = round_sequentially(lambda weight, moment, form, name: gptq(weight, moment, form, name=name), "gptq")

ROUNDINGS: dict[str, Method] = {
    "nearest": round_alone("nearest"),
    "mse-clip": round_alone("mse-clip"),
    "gptq": _GPTQ,
    "learned": learned(_GPTQ, "learned", Learning()),
}
"""Methods by name; one that needs data says so by `ctx.require_calibration`."""


def parts_of(graph: Graph, sites: Sequence[Site], ctx: PassContext, rounding: str) -> dict[str, Parts]:
    """The parts of every weight by its own method or the one called `rounding`; without values where a plan must go without data."""
    parts: dict[str, Parts] = {}
    for method in dict.fromkeys(site.rounding or rounding for site in sites):
        some = [site for site in sites if (site.rounding or rounding) == method]
        if method in LAZY_METHODS or not ctx.outlines("quantize-weights"):
            parts |= ROUNDINGS[method](graph, some, ctx)
        else:
            parts |= {site.weight: _outlined(graph, site) for site in some}
    return parts


def _outlined(graph: Graph, site: Site) -> Parts:
    rows, columns = site.constant.shape
    parts = {
        part: unknown(f"{site.weight}.{part}", part_shape(site.form, part, rows, columns), part_dtype(site.form, part), site.form)
        for part in site.form.parts
    }
    moves = site.readers[0].target in CONVOLUTIONS and owns_bias(graph, site)
    return parts | {BIAS: unknown(f"{site.weight}.{BIAS}", (rows,))} if moves else parts
