"""Rotations and scales that are learned from what the linears read, instead of drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import PipelineError
from qcompile.ir.basis import Basis, Blocks, Diagonal, Hadamard, Orthogonal, identity_matrix
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.collectors import gram
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.scale_readers import STEADY_TOKENS, rounded_linears
from qcompile.passes.space_channels import block_map, covers, request_for, space_name
from qcompile.passes.spaces import Kind, Space, Value, apply_basis_change, find_spaces
from qcompile.passes.statistics import Request
from qcompile.quant.hadamard import fast_hadamard, mixing_matrix
from qcompile.quant.learned_basis import Course, Grid, Reading, learn_diagonal, learn_orthogonal, mean_noise, rotating, scaling
from qcompile.quant.moment_basis import MomentPair, learn_from_moments, mean_moment_noise, principal_axes
from qcompile.quant.scheme import QuantScheme

KINDS = ("orthogonal", "diagonal")
_TOKENS = 512
"""Sampled of each value; a quarter of them only judges what the others taught."""
_ROWS = 256
"""Taken of each weight: its other rows say nearly the same about its columns."""
_PAIRS = 12
"""Of moments that each step looks at."""
MOMENT_BYTES = 2 << 30
_WORTH = 1 / 7
"""Less error than this is not worth a matrix product before a head whose weight an embedding shares."""


@dataclass(frozen=True)
class LearnRotation(Pass):
    """Orthogonal maps (SpinQuant, arXiv:2405.16406), then positive diagonals (OSTQuant, arXiv:2501.13987), by gradient.

    Each space is learned on its own against the error that rounding is expected to leave in the outputs of the linears that read it,
    from a randomised Hadamard rotation and from no scale; on tokens that were held out, what is learned has to be better than these
    and than nothing.
    `online` says that `rotate-hadamard{stream=false,online=linears}` will follow: scales are then learned for channels that are mixed
    before rounding, and a rotation of the residual stream for channels that will be scaled and mixed (`qcompile.quant.moment_basis`), from
    its principal axes. Norms are folded for it, if it promises a seventh less error than the axes that the model comes with; spaces of
    several blocks (heads) are left to that pass.
    """

    name: ClassVar[str] = "learn-rotation"
    kinds: tuple[str, ...] = KINDS
    steps: int = 200
    rate: float = 0.02
    seed: int = 0
    online: bool = False

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """All spaces of one kind, then those of the next."""
        self._check()
        if not rounds_anything(ctx.target.scheme):
            return False
        if ctx.outlines(self.name):
            return self._outlined(graph, ctx)
        changed = False
        for kind in self.kinds:
            changed |= self._learn(graph, ctx, Kind(kind))
        return changed

    def _outlined(self, graph: Graph, ctx: PassContext) -> bool:
        """Without weights: folded norms if a stream is turned, else nothing but values changes."""
        assert ctx.outline is not None
        if not self.online or Kind.ORTHOGONAL.value not in self.kinds:
            return False
        asked = ctx.outline.asked
        if self.name not in asked if asked is not None else not _has_stream(graph, ctx):
            return False
        what = "whether the residual stream is turned to its principal axes"
        turned = ctx.outline.choose(self.name, what, "it keeps the axes it comes with", "it is turned, with norms folded")
        return turned and FoldNorms().run(graph, ctx)

    def _check(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise PipelineError(f"pass {self.name}: option kinds: expected {' and '.join(KINDS)}, got {kind!r}")
        if self.steps < 1 or self.rate <= 0:
            raise PipelineError(f"pass {self.name}: expected steps of at least 1 and a positive rate, got {self.steps} and {self.rate:g}")

    def _learn(self, graph: Graph, ctx: PassContext, kind: Kind) -> bool:
        if self.online and kind is Kind.ORTHOGONAL:
            return self._align(graph, ctx)
        linears = {space: rounded_linears(graph, space, ctx) for space in find_spaces(graph, kind)}
        known = [(space, found) for space, found in linears.items() if found]
        if not known:
            return False
        measured = ctx.statistics(graph, [request_for(value, "sample", _TOKENS) for _, found in known for _, value in found])
        changed = False
        for number, (space, found) in enumerate(known):
            readings = _readings(graph, found, measured, ctx.target.scheme)
            basis = self._rotation(space, readings) if kind is Kind.ORTHOGONAL else self._scale(space, readings)
            if basis is None:
                ctx.note(self.name, f"space {space_name(space)}", f"no {kind.value} map makes its linears better", chosen=True)
            elif ctx.spend():
                apply_basis_change(graph, space, basis, ctx)
                changed = True
            if ctx.report is not None:
                ctx.report(f"learning {kind.value} maps", number + 1, len(known))
        return changed

    def _align(self, graph: Graph, ctx: PassContext) -> bool:
        """Rotate streams to where scaling and mixing their readers' channels leaves least error: tried on a copy first."""
        tried = graph.clone()
        FoldNorms().run(tried, replace(ctx, fuel=None, notes=[], measured=ctx.taken))
        found = {space_name(space): self._aligned(tried, space, ctx) for space in find_spaces(tried, Kind.ORTHOGONAL) if space.blocks == 1}
        maps = {name: basis for name, basis in found.items() if basis is not None}
        if not maps or not ctx.spend():
            return False
        FoldNorms().run(graph, ctx)
        for space in find_spaces(graph, Kind.ORTHOGONAL):
            if space_name(space) in maps:
                apply_basis_change(graph, space, maps[space_name(space)], ctx)
        return True

    def _aligned(self, graph: Graph, space: Space, ctx: PassContext) -> Basis | None:
        """A rotation that is worth it, if there is any."""
        pairs = _moment_pairs(graph, space, ctx)
        if not pairs:
            return None
        axes = principal_axes(pairs)
        before, after = (mean_moment_noise(pairs, rotation) for rotation in (torch.eye(space.size), axes))
        if after < before:  # else the model's own axes are better than what only looks at its activations: nothing has hidden them
            course = Course(self.steps, self.rate, _PAIRS, self.seed)
            axes = learn_from_moments(pairs, axes, course, ctx.progress("learning a rotation"))
            after = mean_moment_noise(pairs, axes)
        if after > before * (1 - _WORTH):
            reason = f"its own axes do: other ones promise {100 * (1 - after / before):.0f} % less error"
            ctx.note(self.name, f"space {space_name(space)}", reason, chosen=True)
            return None
        return Orthogonal.nearest(axes)

    def _rotation(self, space: Space, readings: Sequence[Reading]) -> Basis | None:
        drawn = Hadamard(space.block_size, self.seed)
        start = identity_matrix(drawn).float().expand(space.blocks, -1, -1).contiguous()
        learned = learn_orthogonal([_taught(reading) for reading in readings], start, self._course())
        held = [_held(reading) for reading in readings]
        exact = [Orthogonal.nearest(part) for part in learned]
        choices: list[tuple[float, Basis | None]] = [
            (_noise(held, rotating(torch.eye(space.block_size).expand_as(start))), None),
            (_noise(held, rotating(start)), drawn if space.blocks == 1 else Blocks((drawn,) * space.blocks)),
            (_noise(held, rotating(learned)), exact[0] if space.blocks == 1 else Blocks(tuple(exact))),
        ]
        return min(choices, key=lambda choice: choice[0])[1]

    def _scale(self, space: Space, readings: Sequence[Reading]) -> Basis | None:
        behind = _mixed if self.online else None
        start = torch.zeros(space.size)
        learned = learn_diagonal([_taught(reading) for reading in readings], start, space.blocks, self._course(), behind)
        held = [_held(reading) for reading in readings]
        if _noise(held, scaling(learned, space.blocks, behind)) >= _noise(held, scaling(start, space.blocks, behind)):
            return None
        return block_map(space, Diagonal, learned.double().exp())

    def _course(self) -> Course:
        return Course(self.steps, self.rate, seed=self.seed)


def _has_stream(graph: Graph, ctx: PassContext) -> bool:
    """Whether, with norms folded, there is a stream to turn that linears which are rounded read."""
    tried = graph.clone()
    FoldNorms().run(tried, replace(ctx, notes=[]))
    spaces = find_spaces(tried, Kind.ORTHOGONAL)
    return any(space.blocks == 1 and rounded_linears(tried, space, ctx) for space in spaces)


def rounds_anything(scheme: QuantScheme) -> bool:
    """Whether linears are rounded at all."""
    return scheme.weight is not None or scheme.activation is not None


def _moment_pairs(graph: Graph, space: Space, ctx: PassContext) -> list[MomentPair]:
    """Of the values that lie in the space as they are; where all would be too large, of as many as memory bears, evenly spread."""
    readers: dict[Value, list[fx.Node]] = {}
    for node, value in rounded_linears(graph, space, ctx):
        if covers(value, space):
            readers.setdefault(value, []).append(node)
    stride = -(-len(readers) * 8 * space.size**2 // MOMENT_BYTES)
    chosen = list(readers)[:: max(1, stride)]
    measured = ctx.statistics(graph, [request_for(value, "second_moment") for value in chosen], tokens=STEADY_TOKENS)
    pairs = []
    for value in chosen:
        weights = torch.zeros(space.size, space.size)
        for node in readers[value]:
            weights += gram(graph.constants[str(node.args[1].target)].materialize().float())  # type: ignore[union-attr]
        pairs.append(MomentPair(measured[request_for(value, "second_moment")], weights))
    return pairs


def _readings(
    graph: Graph, linears: Sequence[tuple[fx.Node, Value]], measured: Mapping[Request, Tensor], scheme: QuantScheme
) -> list[Reading]:
    """One for each value, of all linears that read it."""
    weights: dict[Value, list[Tensor]] = {}
    for node, value in linears:
        weight = graph.constants[str(node.args[1].target)].materialize().float()  # type: ignore[union-attr]
        weights.setdefault(value, []).append(weight[:: max(1, len(weight) // _ROWS)])
    grids = _input_grid(scheme), _weight_grid(scheme)
    readings = []
    for value, rows in weights.items():
        runs = tuple((place.start, place.block) for place in value.places)
        readings.append(Reading(measured[request_for(value, "sample", _TOKENS)], torch.cat(rows), runs, *grids))
    return readings


def _input_grid(scheme: QuantScheme) -> Grid | None:
    form = scheme.activation
    if form is None:
        return None
    return Grid(form.element.bits, form.granularity.group_size, form.symmetric, form.clip, form.static)


def _weight_grid(scheme: QuantScheme) -> Grid | None:
    form = scheme.weight
    return None if form is None else Grid(form.element.bits, form.granularity.group_size, form.symmetric)


def _taught(reading: Reading) -> Reading:
    return reading.on(slice(len(reading.inputs) // 4, None))


def _held(reading: Reading) -> Reading:
    return reading.on(slice(0, max(1, len(reading.inputs) // 4)))


def _noise(readings: Sequence[Reading], move: Callable[[Tensor, Reading, bool], Tensor]) -> float:
    with torch.no_grad():
        return float(mean_noise(readings, move))


def _mixed(rows: Tensor) -> Tensor:
    """Behind the rotation that is done online."""
    size = rows.shape[-1]
    mixing = mixing_matrix(size)
    return fast_hadamard(rows, None if mixing is None else mixing.to(rows.dtype), size)
