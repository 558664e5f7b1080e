"""blame(): which quantizer, in which layer, put there by which pass, costs a compiled model how much."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile import frontend
from qcompile.codegen.select import backend_for
from qcompile.compiled import CompiledModel, load
from qcompile.data import packaged_text
from qcompile.dump.blame import KL, NOISE, Blame, Cell, Step
from qcompile.errors import QCompileError, SourceError
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets, Settings
from qcompile.passes.attribution import Attribution, Blamed, attribute, usual_budget
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.calibration import Calibration, batches, make_calibration
from qcompile.passes.calibration_data import CalibrationData
from qcompile.passes.convert_dtype import convert
from qcompile.passes.example_run import ExampleRun
from qcompile.passes.execution import Inputs
from qcompile.passes.instruments import EXACT_TOLERANCE
from qcompile.passes.locate import locate
from qcompile.passes.output_distance import Distance, OutputNoise, TokenKl
from qcompile.passes.pipelines import choose_passes
from qcompile.passes.rerun import ALTERED, Stage, run_again
from qcompile.passes.switched_run import SwitchedRun
from qcompile.passes.switches import KINDS, Redirects, Switch, by_place, with_alternatives
from qcompile.passes.work import WorkStore, program_key
from qcompile.progress import Report, terminal_progress
from qcompile.quant.scheme import dtype_name
from qcompile.quant.scheme_json import scheme_from_json
from qcompile.target import Target, parse_target, resolve

DEFAULT_LENGTH = 256
"""Tokens of a window of the packaged text."""
MOST_EVALUATIONS = 256
"""Unless a budget says otherwise: minutes for a model of 135 million parameters."""
NOT_A_NUMBER = 1e6
"""What outputs count that are NaN or infinite: more than any number, so that who makes them is found like anybody else."""
_NOTICEABLE = 0.01
"""Share of the whole that passes without quantizers may add before each is measured."""
_LEAST = 1e-6
"""What float32 leaves of a KL, or of noise over signal."""


def blame(
    compiled: CompiledModel | str | os.PathLike[str],
    reference: Any,
    *,
    tokens: Any = None,
    inputs: Any = None,
    windows: int = 1,
    budget: int | None = None,
    passes: Sequence[Pass] | None = None,
    calibration: Any = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    report: Report | None = None,
) -> Blame:
    """Share the distance of a compiled model from its reference among passes, layers and kinds of quantizers.

    The recorded pipeline runs again on the reference, without rounding anything: codes, scales and tables are the compiled model's own.
    Every quantizer is then a switch between rounded values and the float ones that stand in the same basis. Groups are switched off (what
    vanishes?) and on alone (what is there?), by kinds, then halves of the layers, then single quantizers, the costly ones first. All
    settings run in float32; what computing in another dtype costs is a group of its own.

    Args:
        compiled: a compiled model, or the directory of an artifact.
        reference: the model that it was made from, in whatever form `qcompile.compile` takes.
        tokens: int [W, S] to measure on (an array or the path of a .npy file), or text or the path of a .txt file; by default the packaged
            evaluation text, in windows of 256 tokens.
        inputs: what a plain module is called with: an iterable of tensors, tuples or mappings; by default its examples.
        windows: how many windows of tokens are used.
        budget: evaluations for switching at most; by default n·log2(n) for n quantizers, and at most 256.
        passes: the pipeline, where it has passes that are not of this package; by default the recorded one.
        calibration: what it was calibrated on, where passes before rounding needed data other than the packaged text.
        example_inputs: what a plain module is traced with.
        dynamic_shapes: as `qcompile.compile` takes them.
        report: called with (what is done, done, total).

    Returns:
        Cells by share, with tables, a heat map and a dict.

    Raises:
        ArtifactError: if `compiled` is a directory without an artifact.
        SourceError: for another model as reference, tokens that do not fit, or a compiled model without quantizers.
    """
    if windows < 1 or (budget is not None and budget < 1):
        raise SourceError(f"blame: expected at least one window and one evaluation, got windows={windows}, budget={budget}")
    model = compiled if isinstance(compiled, CompiledModel) else load(compiled, engine="reference")
    loaded = frontend.load(reference, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    target = _target(model)
    pipeline = choose_passes(target, "best", model.contents.pipeline if passes is None else list(passes))
    data = _calibration(model.contents.settings, calibration, loaded.assets)
    ctx = PassContext(target, backend_for(target), calibration=data, work=WorkStore(program_key()))
    listening: AbstractContextManager[Report] = terminal_progress() if report is None else nullcontext(report)
    with listening as ctx.report:
        stages = run_again(loaded.graph, pipeline, ctx, model.graph)
        switches = by_place(stages[-1].graph, [switch for stage in stages for switch in stage.switches])
        if not switches:
            raise SourceError(
                f"blame: expected a model with quantizers, got one for {model.contents.target}, which rounds nothing; there is nothing to "
                "switch off"
            )
        samples = _samples(stages[0].graph, tokens, inputs, windows, loaded.assets)
        return _Measurement(model, stages, switches, samples, target, ctx.progress("evaluating")).result(budget)


def _target(model: CompiledModel) -> Target:
    """The target with the scheme that it was compiled for; the preset where the artifact does not say."""
    preset, scheme = parse_target(model.contents.target), model.contents.settings.scheme
    return preset if scheme is None else resolve(preset.arch, scheme_from_json(scheme))


def _calibration(settings: Settings, asked: Any, assets: Assets) -> Calibration:
    """The data that passes ran the model on, read and compared with what was recorded when a pass asks for it."""
    known = settings.calibration
    if known is None:
        return make_calibration(asked, assets)

    def read() -> CalibrationData:
        where = f"blame: expected the calibration data of the compiled model, {known.name} in {known.windows} windows or inputs, got"
        remedy = "pass that data with calibration= (--calibration)"
        try:
            data = make_calibration(asked, assets, num_calibration_samples=known.windows, max_seq_length=known.length or None).data
        except QCompileError as error:
            raise SourceError(f"{where} none: {error}; {remedy}") from error
        if data.key != known.key:
            raise SourceError(f"{where} {data.name}, which is other data; {remedy}")
        return data

    return Calibration(read)


def _samples(graph: Graph, tokens: Any, inputs: Any, windows: int, assets: Assets) -> Calibration:
    """What to measure on, as calibration data is given to a graph."""
    if graph.interface.kind not in ("causal_lm", "cached_lm"):
        if tokens is not None:
            raise SourceError("blame: expected inputs of a plain module, got tokens; pass inputs=")
        examples = {node.name: graph.interface.examples[node.name] for node in graph.placeholders}
        return make_calibration([examples] if inputs is None else inputs, assets)
    if inputs is not None:
        raise SourceError("blame: expected tokens for a language model, got inputs; pass tokens=")
    if tokens is None:
        return make_calibration(packaged_text("evaluation"), assets, num_calibration_samples=windows, max_seq_length=DEFAULT_LENGTH)
    data = make_calibration(tokens, assets, num_calibration_samples=windows)
    if data.data.tokens is None or data.data.tokens.shape[1] < 2:
        raise SourceError("blame: expected tokens in windows of at least 2, got others; pass int [windows, length]")
    return data


class _Measurement:
    """The evaluations, counted."""

    def __init__(
        self, model: CompiledModel, stages: Sequence[Stage], switches: Sequence[Switch], samples: Calibration, target: Target,
        progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self._model, self._stages, self._switches, self._samples = model, stages, switches, samples
        self._dtype, self._progress = target.compute, progress
        last = next(stage for stage in reversed(stages) if stage.switches)
        bypassed = [switch for stage in stages for switch in stage.bypassed]
        self._program, redirects = with_alternatives(last.graph, [*switches, *bypassed])
        self._redirects = redirects[: len(switches)]
        self._always: Redirects = {on: off for pairs in redirects[len(switches) :] for on, off in pairs.items()}
        self._everyone = frozenset(range(len(switches)))
        self._evaluations, self._expected = 0, 0
        wanted = self._outputs(stages[0].graph)
        is_lm = stages[0].graph.interface.kind in ("causal_lm", "cached_lm")
        self._distance: Distance = TokenKl(wanted) if is_lm else OutputNoise(wanted)
        self._unit = KL if is_lm else NOISE
        self._seen = sum(batch[0].shape[0] * (batch[0].shape[1] if is_lm else 1) for batch in wanted)

    def result(self, budget: int | None) -> Blame:
        """Everything."""
        count = len(self._switches)
        allowed = usual_budget(count, MOST_EVALUATIONS) if budget is None else budget
        self._expected = allowed
        found = self._switched(allowed - (1 if self._dtype == torch.float32 else 3))  # less the compiled model itself, and another dtype
        total = self._of(self._model.graph)
        cells = [self._cell(group) for group in found.groups]
        narrow = self._narrow(found) if self._dtype != torch.float32 else None
        if narrow is not None:
            cells.append(narrow[0])
        rounded = found.total if narrow is None else narrow[1]
        steps = [*self._steps_before(found.floor, total), *self._steps_behind(rounded, total)]
        name = self._model.assets.name or self._model.assets.model_type
        return Blame(
            name, self._model.contents.target, self._unit, total, tuple(sorted(cells, key=lambda cell: -cell.share)), tuple(steps),
            found.floor, count, self._evaluations, allowed, self._seen,
        )  # fmt: skip

    def _switched(self, budget: int) -> Attribution:
        """Shares of all quantizers, in float32."""
        run = self._run(torch.float32)
        layers = [-1 if switch.layer is None else switch.layer for switch in self._switches]
        starts = [place for place, layer in enumerate(layers) if place == 0 or layer != layers[place - 1]]
        cuts = {on for place in starts for on in self._readers(self._redirects[place])}
        ends = {off: self._count(run.keep(off, cuts)) for off in (frozenset[int](), self._everyone)}
        places = sorted({(KINDS.index(switch.kind), switch.step) for switch in self._switches})
        groups = [
            tuple(place for place, switch in enumerate(self._switches) if (KINDS.index(switch.kind), switch.step) == group)
            for group in places
        ]
        return attribute(groups, lambda off: ends[off] if off in ends else self._count(run.run(off)), layers, budget)

    def _readers(self, pairs: Redirects) -> list[str]:
        """The first node that reads what a switch redirects."""
        named = {node.name: node for node in self._program.fx.nodes}
        order = {node: place for place, node in enumerate(self._program.fx.nodes)}
        return [min(named[on].users, key=order.__getitem__).name for on in pairs if named[on].users]

    def _run(self, dtype: torch.dtype) -> SwitchedRun:
        program = self._program.clone()
        convert(program, dtype, values=False)
        return SwitchedRun(program, self._redirects, self._always, self._inputs(program))

    def _inputs(self, graph: Graph) -> Inputs:
        return batches(self._samples, graph)

    def _outputs(self, graph: Graph) -> list[list[Tensor]]:
        """Of a graph as it stands."""
        return SwitchedRun(graph, [], {}, self._inputs(graph)).run(frozenset())

    def _of(self, graph: Graph) -> float:
        return self._count(self._outputs(graph))

    def _count(self, outputs: list[list[Tensor]]) -> float:
        self._evaluations += 1
        if self._progress is not None:
            self._progress(min(self._evaluations, self._expected), self._expected)
        found = self._distance(outputs)
        return found if math.isfinite(found) else NOT_A_NUMBER

    def _cell(self, group: Blamed) -> Cell:
        chosen = [self._switches[place] for place in group.members]
        layers = tuple(switch.layer for switch in chosen)
        layer = layers[0] if len(set(layers)) == 1 else None
        first = chosen[0]
        if len(chosen) == 1:
            return Cell(layer, first.kind, first.step, first.node, first.name, group.off, group.alone, layers)
        return Cell(layer, first.kind, first.step, "", _group_name(chosen, layer), group.off, group.alone, layers)

    def _narrow(self, found: Attribution) -> tuple[Cell, float]:
        """What computing in the target's own dtype costs: without quantizers, and with all of them; and the distance with all."""
        run = self._run(self._dtype)
        alone, everything = self._count(run.run(self._everyone)), self._count(run.run(frozenset()))
        name = f"computing in {dtype_name(self._dtype)}"
        return Cell(None, "activations", "convert-dtype", "", name, everything - found.total, alone - found.floor), everything

    def _steps_before(self, floor: float, total: float) -> list[Step]:
        """Passes up to the last quantizers, where the distance with all quantizers off is not nothing: each changes the float side."""
        return [] if floor <= max(_LEAST, _NOTICEABLE * total) else self._measured(0, self._last_place)

    def _steps_behind(self, rounded: float, total: float) -> list[Step]:
        """Passes after the last quantizers, where the compiled model is not as far away as the quantizers leave it."""
        unexplained = abs(total - rounded) > max(_LEAST, _NOTICEABLE * total)
        return self._measured(self._last_place, len(self._stages) - 1) if unexplained else []

    @property
    def _last_place(self) -> int:
        """Of the last stage with quantizers that a pass made."""
        return max((place for place, stage in enumerate(self._stages) if stage.switches and stage.name != ALTERED), default=0)

    def _measured(self, first: int, last: int) -> list[Step]:
        """What each stage after `first` adds up to `last`; those that hold quantizers move the distance too, and are no steps."""
        steps = []
        before = self._of(self._stages[first].graph)
        for old, stage in pairwise(self._stages[first : last + 1]):
            after = self._of(stage.graph)
            if not stage.switches and abs(after - before) > _LEAST:
                place = locate(old.graph, stage.graph, ExampleRun(), tolerance=EXACT_TOLERANCE, wide=True) if stage.is_exact else None
                where = ("", "") if place is None else (place.node, str(place))
                steps.append(Step(stage.name, after - before, stage.is_exact, *where))
            before = after
        return steps


def _group_name(chosen: Sequence[Switch], layer: int | None) -> str:
    """What a group holds, for people."""
    first, last = chosen[0], chosen[-1]
    if layer is not None:
        return f"{len(chosen)} of layer {layer}: {first.name} to {last.name}"
    return f"{len(chosen)}: {first.name} to {last.name}"


def read_arrays(path: Path) -> list[Mapping[str, Tensor]]:
    """The arrays of a .npz file by name, as what a plain module is called with once.

    Raises:
        SourceError: if it cannot be read without unpickling.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}]
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:
        raise SourceError(f"{path}: expected arrays by the names of the inputs, saved by numpy.savez, got {error}") from None
