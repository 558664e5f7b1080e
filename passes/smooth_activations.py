"""Outlier channels of activations are scaled down, and the weight columns that read them up: the difficulty is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.errors import PipelineError
from qcompile.ir.basis import Diagonal
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.norm_surgery import give_gains
from qcompile.passes.patches import CONVOLUTIONS
from qcompile.passes.scale_readers import READER_ROWS, STEADY_TOKENS, readers_of, rounds
from qcompile.passes.space_channels import block_map, member_magnitudes, read_values, request_for, space_name, value_magnitudes
from qcompile.passes.spaces import Kind, Space, apply_basis_change, find_spaces
from qcompile.passes.statistics import Request
from qcompile.quant.scale_search import best_scale, smoothing_scale

MEASURES = ("absmax", "absmean")
_ALPHAS = tuple(step / 10 for step in range(1, 10))


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """SmoothQuant (arXiv:2211.10438): channel j is divided by `max|x_j|^a / max|w_j|^(1-a)`, in every space that admits a diagonal.

    With `measure=absmean` means take the place of the maxima: with `alpha=0.5` the least error where channels are mixed before they are
    rounded (`rotate-hadamard{stream=false,online=linears}` after it), since it then is `tr(D S D) · tr(D⁻¹ WᵀW D⁻¹)` that counts.
    RMS norms without a gain that linears read are given one, for the diagonal to go into.
    `alpha` is a for all of them, or `search`: for each space the one that leaves the least error in the outputs of its linears, both
    operands rounded as the scheme rounds them. Without `convolutions`, spaces that one reads stay as they are.
    """

    name: ClassVar[str] = "smooth-activations"
    alpha: str = "0.5"
    measure: str = "absmax"
    convolutions: bool = True

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """One diagonal per space that something reads."""
        fixed = self._fixed()
        if self.measure not in MEASURES:
            raise PipelineError(f"pass {self.name}: option measure: expected {' or '.join(MEASURES)}, got {self.measure!r}")
        gains = give_gains(graph)
        if ctx.outlines(self.name):
            return gains  # what is left only changes values
        spaces = [space for space in find_spaces(graph, Kind.DIAGONAL) if self._is_chosen(space)]
        if not spaces or (fixed is None and not rounds(ctx)):
            return gains
        values = [value for space in spaces for value in read_values(space)]
        requests = [request_for(value, self.measure) for value in values]
        if fixed is None:
            requests += [request_for(value, "sample", READER_ROWS) for value in values]
        measured = ctx.statistics(graph, requests, tokens=STEADY_TOKENS if self.measure == "absmean" else None)
        changed = gains
        for space in spaces:
            scale = self._scale(graph, space, measured, ctx, fixed)
            if scale is None:
                ctx.note(self.name, f"space {space_name(space)}", "no scale makes its linears better", chosen=True)
            elif ctx.spend():
                apply_basis_change(graph, space, block_map(space, Diagonal, 1 / scale), ctx)
                changed = True
        return changed

    def _fixed(self) -> float | None:
        """The one alpha, or None for a search."""
        if self.alpha == "search":
            return None
        try:
            alpha = float(self.alpha)
        except ValueError:
            alpha = -1.0
        if not 0 <= alpha <= 1:
            raise PipelineError(f"pass {self.name}: option alpha: expected a number between 0 and 1 or search, got {self.alpha!r}")
        return alpha

    def _scale(
        self, graph: Graph, space: Space, measured: Mapping[Request, Tensor], ctx: PassContext, fixed: float | None
    ) -> Tensor | None:
        inputs = torch.stack([value_magnitudes(space, value, measured, self.measure) for value in read_values(space)]).amax(0)
        reading = [member_magnitudes(graph, space, member, self.measure) for member in space.members if member.contravariant]
        weights = torch.stack(reading).amax(0)
        if fixed is not None:
            return smoothing_scale(inputs, weights, fixed)
        readers = readers_of(graph, space, measured, ctx)
        return best_scale((smoothing_scale(inputs, weights, alpha) for alpha in _ALPHAS), readers)[0] if readers else None

    def _is_chosen(self, space: Space) -> bool:
        return bool(read_values(space)) and (self.convolutions or not any(node.target in CONVOLUTIONS for node in space.readers))
