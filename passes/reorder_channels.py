"""Channels are put in the order of their magnitude, so that a quantization block holds channels of like range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.errors import PipelineError
from qcompile.ir.basis import Permutation
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.space_channels import block_map, by_block, measured_values, request_for, space_name, value_magnitudes
from qcompile.passes.spaces import Kind, Space, apply_basis_change, find_spaces
from qcompile.passes.statistics import Request
from qcompile.quant.scale_search import floored

CRITERIA = {"absmax": "absmax", "second-moment": "second_moment"}


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """K-sort (Accurate Block Quantization in LLMs with Outliers, arXiv:2403.20137) of every space that admits it, heads one by one.

    `by` is what is sorted by, on calibration data: each channel's `absmax`, or the root of its `second-moment`. Where several values live
    in a space (the residual stream) the geometric mean over them counts.
    """

    name: ClassVar[str] = "reorder-channels"
    by: str = "absmax"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """All statistics in one run over the data, then one permutation per space."""
        if self.by not in CRITERIA:
            raise PipelineError(f"pass {self.name}: option by: expected {' or '.join(CRITERIA)}, got {self.by!r}")
        spaces = {space: measured_values(space) for space in find_spaces(graph, Kind.PERMUTATION)}
        for space in [space for space, values in spaces.items() if not values]:
            ctx.note(self.name, f"space {space_name(space)}", "nothing reads or writes its channels as one axis", chosen=True)
            del spaces[space]
        if ctx.outlines(self.name):
            return False
        kind = CRITERIA[self.by]
        measured = ctx.statistics(graph, [request_for(value, kind) for values in spaces.values() for value in values]) if spaces else {}
        changed = False
        for space in spaces:
            order = self._order(space, measured)
            if not torch.equal(by_block(space, order), torch.arange(space.block_size).expand(space.blocks, -1)) and ctx.spend():
                apply_basis_change(graph, space, block_map(space, Permutation, order), ctx)
                changed = True
        return changed

    def _order(self, space: Space, measured: Mapping[Request, Tensor]) -> Tensor:
        """Within each block the channels from large to small: [space.size]."""
        kind = CRITERIA[self.by]
        found = [value_magnitudes(space, value, measured, kind) for value in measured_values(space)]
        key = torch.stack([floored(magnitude).log() for magnitude in found]).mean(0)
        return by_block(space, key).argsort(descending=True, stable=True).reshape(-1)
