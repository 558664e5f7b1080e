"""Weight columns that read large activations are scaled up before rounding, so that they are rounded finely."""

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
from qcompile.passes.scale_readers import READER_ROWS, readers_of, rounds
from qcompile.passes.space_channels import block_map, read_values, request_for, space_name, value_magnitudes
from qcompile.passes.spaces import Kind, Space, apply_basis_change, find_spaces
from qcompile.passes.statistics import Request
from qcompile.quant.scale_search import best_scale, salience_scale


@dataclass(frozen=True)
class ScaleSalientWeights(Pass):
    """AWQ's search (arXiv:2306.00978): for each space that admits a diagonal, `mean|x|^a` with a from a grid of `steps` values up to 1.

    The a with the least error in the outputs of the linears that read the space is taken, their weights rounded to nearest in the
    scheme's format; clipping, AWQ's other half, belongs to the rounding.
    """

    name: ClassVar[str] = "scale-salient-weights"
    steps: int = 20

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Statistics for all spaces first: a change of basis would make them be measured anew."""
        if self.steps < 1:
            raise PipelineError(f"pass {self.name}: option steps: expected at least 1, got {self.steps}")
        spaces = [space for space in find_spaces(graph, Kind.DIAGONAL) if read_values(space)]
        if not spaces or not rounds(ctx) or ctx.outlines(self.name):
            return False
        values = [value for space in spaces for value in read_values(space)]
        requests = [request_for(value, "absmean") for value in values] + [request_for(value, "sample", READER_ROWS) for value in values]
        measured = ctx.statistics(graph, requests)
        changed = False
        for number, space in enumerate(spaces):
            scale, reason = self._scale(graph, space, measured, ctx)
            if scale is None:
                ctx.note(self.name, f"space {space_name(space)}", reason, chosen=True)
            elif ctx.spend():
                apply_basis_change(graph, space, block_map(space, Diagonal, 1 / scale), ctx)
                changed = True
            if ctx.report is not None:
                ctx.report("searching scales", number + 1, len(spaces))
        return changed

    def _scale(self, graph: Graph, space: Space, measured: Mapping[Request, Tensor], ctx: PassContext) -> tuple[Tensor | None, str]:
        readers = readers_of(graph, space, measured, ctx)
        if not readers:
            return None, "no linear that the scheme rounds reads it"
        magnitude = torch.stack([value_magnitudes(space, value, measured, "absmean") for value in read_values(space)]).amax(0)
        candidates = (salience_scale(magnitude, step / self.steps) for step in range(1, self.steps + 1))
        return best_scale(candidates, readers)[0], "no scale makes its linears better"
