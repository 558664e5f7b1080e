"""The ways to round weights, by the name that `rounding=` takes."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.ir.constants import rounded_constants
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.learn_rounding import Learning, learned
from qcompile.passes.round_sequentially import round_sequentially
from qcompile.passes.sites import Method, Parts, Site
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
