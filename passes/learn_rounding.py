"""Roundings learned end to end: from where another method ends, levels and scales move to bring the whole graph's results back.

Every step takes a few windows of calibration text, compares the graph's results with those it had in float, and moves all weights at
once along the gradient (straight through the rounding; the idea of AutoRound, arXiv:2309.05516, with the objective of LLM-QAT,
arXiv:2305.17888). Some windows are held out: if the result is no better on them, the start is what stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.constants import tensor_constant
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import GraphInputs, batches
from qcompile.passes.differentiable import Differentiable
from qcompile.passes.divergence import Divergence, divergence
from qcompile.passes.execution import Progress
from qcompile.passes.round_filters import bias_name
from qcompile.passes.selection import find_heads
from qcompile.passes.sites import BIAS, RESIDUAL, Method, Parts, Site, marked
from qcompile.passes.substitutes import narrowed
from qcompile.passes.work import WorkStore, content_key
from qcompile.quant.reference import Quantized
from qcompile.quant.rounding.descent import Descent
from qcompile.quant.rounding.latent import LatentWeight

_FASTER = 1.5
"""Coarser grids have more to gain, and bear larger steps."""
LEARNING_BYTES = 20
"""Of memory for each weight: its continuous value, the mean of its gradients, one more gradient and copies in float32 and bfloat16."""


@dataclass(frozen=True)
class Learning:
    """How long and how fast.

    Attributes:
        epochs: passes over the calibration data.
        tokens_at_once: of one step.
        rate: how far a step moves the continuous values of a weight, in steps of their grid, root mean square, at 4 bits; half as much
            again for each bit less.
        scale_rate: most that a step changes a scale, relative, at 4 bits; likewise.
        warmup: share of the steps in which rates rise to the full, before they fall to 0.
        held_out: one batch in so many is not learned from, but decides whether the result is taken.
        seed: of the order of batches.
        most_elements: weights of larger models are left as they are at the start.
    """

    epochs: float = 1.0
    tokens_at_once: int = 512
    rate: float = 5e-4
    scale_rate: float = 1e-4
    warmup: float = 0.1
    held_out: int = 16
    seed: int = 0
    most_elements: int = 500_000_000


def learned(start: Method, label: str, settings: Learning) -> Method:
    """The method that begins where `start` ends; needs calibration data, and memory for several copies of the weights."""

    def run(graph: Graph, sites: Sequence[Site], ctx: PassContext) -> dict[str, Parts]:
        calibration = ctx.require_calibration(f"quantize-weights{{rounding={label}}}")
        parts = start(graph, sites, ctx)
        elements = sum(site.constant.nbytes // site.constant.dtype.itemsize for site in sites)
        if elements > settings.most_elements:
            most = settings.most_elements
            what = f"learning takes {LEARNING_BYTES} bytes for each of {elements:.2g} weights, at most {most:.2g} are learned"
            ctx.note("quantize-weights", label, what, chosen=True)
            return parts
        store = _store(graph, sites, ctx, f"quantize-weights {label} {settings} {calibration.key}")
        kept = _recall(sites, store)
        if kept is not None:
            return kept
        inputs = batches(calibration, graph, settings.tokens_at_once)
        course = _Course(graph, sites, parts, inputs, settings)
        if course.learn(ctx.progress(f"learning roundings ({label})")):
            return _keep(sites, course.latents, store, parts)
        ctx.note("quantize-weights", label, "learning did not help on the calibration data that was held out", chosen=True)
        return parts

    return run


def _store(graph: Graph, sites: Sequence[Site], ctx: PassContext, what: str) -> WorkStore | None:
    forms = " ".join(f"{site.weight}:{site.form}" for site in sites)
    return None if ctx.work is None else ctx.work.part(f"{what} {content_key(graph)} {forms}")


def _recall(sites: Sequence[Site], store: WorkStore | None) -> dict[str, Parts] | None:
    if store is None:
        return None
    found = {site: store.get(site.weight) for site in sites}
    return {site.weight: marked(parts, site.form) for site, parts in found.items() if parts} if all(found.values()) else None


def _keep(sites: Sequence[Site], latents: dict[str, LatentWeight], store: WorkStore | None, start: dict[str, Parts]) -> dict[str, Parts]:
    kept: dict[str, Parts] = {}
    for site in sites:
        rounded = latents[site.weight].rounded(site.weight)
        tensors = {part: getattr(rounded, part) for part in site.form.parts}
        if BIAS in start[site.weight]:
            tensors[BIAS] = start[site.weight][BIAS].materialize()
        parts = {part: tensor_constant(tensor) for part, tensor in tensors.items()} if store is None else store.put(site.weight, tensors)
        kept[site.weight] = marked(parts, site.form)
    return kept


class _Course:
    """One course of learning over a graph."""

    def __init__(self, graph: Graph, sites: Sequence[Site], parts: dict[str, Parts], inputs: GraphInputs, settings: Learning) -> None:
        self._inputs, self._settings = inputs, settings
        self._sites = {site.weight: site for site in sites}
        self._judge: Divergence = divergence(graph, find_heads(graph) - {reader for site in sites for reader in site.readers})
        self._graph = Differentiable(_with_biases(graph, sites, parts), self._judge.ends, list(self._sites), inputs)
        self._wanted = self._float_results(Differentiable(graph, self._judge.ends, list(self._sites), inputs, exact=True))
        self.latents = {site.weight: _latent(site, parts[site.weight]) for site in sites}
        self._paths = {name: self._path(name) for name in self.latents}
        self._weights = {name: self._rounded(name) for name in self.latents}

    def learn(self, progress: Progress | None) -> bool:
        """Take all steps; True if the batches held out have come nearer to the float results."""
        count = len(self._inputs)
        held = [index for index in range(count) if index % self._settings.held_out == self._settings.held_out - 1]
        taught = [index for index in range(count) if index not in held]
        order = self._order(taught)
        before = self._distance(held)
        for step, batch in enumerate(order):
            self._step(batch, self._share(step, len(order)))
            if progress is not None:
                progress(step + 1, len(order))
        return not held or self._distance(held) < before

    def _order(self, taught: list[int]) -> list[int]:
        generator = torch.Generator().manual_seed(self._settings.seed)
        steps = max(1, round(self._settings.epochs * len(taught)))
        order: list[int] = []
        while len(order) < steps:
            order += [taught[index] for index in torch.randperm(len(taught), generator=generator).tolist()]
        return order[:steps]

    def _share(self, step: int, steps: int) -> float:
        """Of the full rate: rising, then falling to 0."""
        return min(1.0, (step + 1) / max(1.0, self._settings.warmup * steps)) * (1 - step / steps)

    def _step(self, batch: int, share: float) -> None:
        kept = self._graph.forward(batch, self._weights)
        _, gradients = self._judge(self._graph.results(kept), self._wanted[batch], self._inputs.real(batch))
        for name, gradient in self._graph.backward(batch, self._weights, kept, gradients):
            self._move(name, gradient, share)

    def _move(self, name: str, gradient: Tensor, share: float) -> None:
        latent = self.latents[name]
        for path, slope in zip(self._paths[name], latent.gradients(gradient.reshape(latent.latent.shape)), strict=True):
            path.step(slope, share)
        latent.confine()
        self._weights[name] = self._rounded(name)

    def _distance(self, held: list[int]) -> float:
        total = 0.0
        for batch in held:
            results = self._graph.results(self._graph.forward(batch, self._weights))
            total += self._judge(results, self._wanted[batch], self._inputs.real(batch))[0]
        return total / max(1, len(held))

    def _float_results(self, exact: Differentiable) -> list[list[Tensor]]:
        """What the graph gives where nothing is rounded, per batch."""
        weights = {name: _operand(site, site.constant.materialize().float()) for name, site in self._sites.items()}
        return [exact.results(exact.forward(batch, weights)) for batch in range(len(self._inputs))]

    def _path(self, name: str) -> tuple[Descent, Descent]:
        latent, bits = self.latents[name], self._sites[name].form.element.bits
        faster = _FASTER ** (4 - bits)
        rate, scale_rate = self._settings.rate * faster * latent.spacing, self._settings.scale_rate * faster * latent.adapts_scale
        return Descent(latent.latent, rate, alike=True), Descent(latent.stretch, scale_rate, alike=False)

    def _rounded(self, name: str) -> Tensor:
        return _operand(self._sites[name], self.latents[name].weight())


def _with_biases(graph: Graph, sites: Sequence[Site], parts: dict[str, Parts]) -> Graph:
    """The graph with the biases that the roundings at the start asked for."""
    result = graph.clone()
    for site in sites:
        if BIAS in parts[site.weight]:
            result.bind(bias_name(site.readers[0]), parts[site.weight][BIAS])
    return result


def _latent(site: Site, parts: Parts) -> LatentWeight:
    tensors = {part: constant.materialize() for part, constant in parts.items()}
    rounded = Quantized(tensors["codes"], tensors["scale"], tensors.get("zero"), tensors.get("scale2"), tensors.get(RESIDUAL))
    return LatentWeight(site.constant.materialize(), rounded, site.form)


def _operand(site: Site, weight: Tensor) -> Tensor:
    """In the shape that readers expect; narrow where only linears read it."""
    only_linears = all(reader.target is torch.ops.aten.linear.default for reader in site.readers)
    return narrowed(weight) if only_linears else weight.reshape(site.shape)
