"""Layers differ in what they lose by a coarse cache: each gets the forms that the whole can afford."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.errors import FormatError, PipelineError
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.cache_sensitivity import losses
from qcompile.quant.cache_format import MIXED_FORMS, Pair
from qcompile.quant.vector_format import vector_format

_BETWEEN = " / "


@dataclass(frozen=True)
class AssignKvFormats(Pass):
    """Choose the forms of each layer's keys and values that lose least within `cache_bits` a number (KVTuner, arXiv:2502.04420).

    What each pair of forms costs is measured over the first `tokens` tokens of the calibration data (`passes/cache_sensitivity.py`), the
    choice is an integer program: least summed loss, one pair for each layer, no more bytes a token than the budget. The forms stand in the
    attentions, where `rewrite-kv-cache` and any dump find them.
    """

    name: ClassVar[str] = "assign-kv-formats"
    tokens: int = 256

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Measure, choose, and write the choice down."""
        cache = ctx.target.scheme.cache
        layers = graph.calls(torch.ops.qcompile.attention.default)
        if not cache.bits or graph.interface.kind != "causal_lm" or not layers:
            return False
        if self.tokens < 2:
            raise PipelineError(f"pass {self.name}: expected tokens of at least 2, got {self.tokens}")
        if ctx.outlines(self.name):
            measured = _assumed_losses(ctx, layers)
        else:
            measured = losses(graph, layers, MIXED_FORMS, cache, ctx.require_calibration(self.name), self.tokens)
        chosen = cheapest(measured, [_bytes(node) for node in layers], cache.bits, sum(map(_numbers, layers)))
        for node, pair in zip(layers, chosen, strict=True):
            node.update_kwarg("cache", _BETWEEN.join(MIXED_FORMS[pair]))
        return True


def _assumed_losses(ctx: PassContext, layers: Sequence[fx.Node]) -> Tensor:
    """For a plan, float64 [layers, pairs]: four times less for each bit, and earlier layers a little more, so that one choice is best."""
    assert ctx.outline is not None
    what = "which forms the keys and values of each layer get within cache_bits"
    ctx.outline.assume(AssignKvFormats.name, what, "the first layers get the finer ones")
    bits = 8 * torch.tensor([_bytes(node) for node in layers], dtype=torch.float64)
    numbers = torch.tensor([_numbers(node) for node in layers], dtype=torch.float64).unsqueeze(1)
    return 4.0 ** -(bits / numbers) * (1 + torch.arange(len(layers), 0, -1, dtype=torch.float64).unsqueeze(1) / len(layers))


def assigned_forms(attention: fx.Node) -> Pair | None:
    """What this pass chose for an attention; None where it did not run."""
    keys, between, values = str(attention.kwargs.get("cache", "")).partition(_BETWEEN)
    return (keys, values) if between else None


def _sizes(attention: fx.Node) -> tuple[int, int, int]:
    keys, values = (fake_value(part).shape for part in attention.args[1:3])
    return int(keys[1]), int(keys[3]), int(values[3])


def _numbers(attention: fx.Node) -> int:
    heads, key, value = _sizes(attention)
    return heads * (key + value)


def _bytes(attention: fx.Node) -> list[int]:
    """Of a token in the pages of a layer, in each of the pairs."""
    heads, key, value = _sizes(attention)
    return [heads * (vector_format(keys).width(key) + vector_format(values).width(value)) for keys, values in MIXED_FORMS]


def cheapest(losses: Tensor, nbytes: Sequence[Sequence[int]], bits: float, numbers: int) -> list[int]:
    """The pair for each layer that makes the sum of `losses` [layers, pairs] least while `nbytes` [layers, pairs] take `bits` a number.

    Raises:
        FormatError: if not even the smallest pairs do.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    size, budget = np.asarray(nbytes, dtype=np.float64), bits * numbers / 8
    least = size.min(axis=1).sum()
    if least > budget:
        raise FormatError(
            f"assign-kv-formats: cache_bits={bits:g}: expected at least {8 * least / numbers:g}, what the smallest forms take at this head "
            "size; give more, or choose a cache with the same forms in every layer"
        )
    layers, pairs = size.shape
    cost = losses.numpy().flatten()
    one_each = np.kron(np.eye(layers), np.ones(pairs))
    found = milp(
        cost / max(cost.max(), 1e-300),  # the solver's tolerances are absolute
        integrality=np.ones(layers * pairs),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size.flatten()[None], 0, budget)],
        options={"mip_rel_gap": 0.0},
    )
    return [int(pair) for pair in found.x.reshape(layers, pairs).argmax(axis=1)]
