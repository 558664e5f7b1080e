"""Learned bases: exact on every family, better than what they start from, and never worse than nothing."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import PipelineError, SourceError
from qcompile.ir.basis import Orthogonal
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.instruments import outputs
from qcompile.passes.learn_rotation import LearnRotation
from qcompile.passes.manager import run_pipeline
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.passes.smooth_activations import SmoothActivations
from qcompile.passes.spaces import Kind, apply_basis_change, find_spaces
from tests.passes.basis_cases import Outliers, after, calibrated, with_data
from tests.passes.helpers import capture, context, names
from tests.passes.space_cases import canonical, family_graph

QUICK = LearnRotation(steps=5)
hadamard = torch.ops.qcompile.hadamard.default


def quantized_error(graph: Graph, ctx: PassContext, linear: str = "") -> float:
    """Energy of the error over that of the outputs, or of one linear's, with weights and activations rounded to nearest in 4 bits."""
    rounded = graph.clone()
    run_pipeline(rounded, [QuantizeActivations(), QuantizeWeights()], context("cpu-w4a4", calibration=ctx.calibration))
    programs = rounded, graph.clone()
    for program in programs if linear else ():
        program.output.args = ((next(node for node in program.nodes if node.name == linear),),)
        program.remove_dead()
    (found, *_), (expected, *_) = (outputs(program, wide=True) for program in programs)
    return float((found - expected).square().sum() / expected.square().sum())


def outliers() -> tuple[Graph, PassContext]:
    """The graph of `Outliers`, its norm with a gain, and a context for four bits."""
    inputs = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    return canonical(capture(Outliers(), inputs[0])), with_data([{"x": sample} for sample in inputs], "cpu-w4a4")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen2_moe", "bert", "resnet"])
def test_the_function_stays(family: str) -> None:
    after(family, FoldNorms(), QUICK)


@pytest.mark.parametrize("kind", ["orthogonal", "diagonal"])
def test_each_kind_alone_changes_weights_only(kind: str) -> None:
    graph, changed = after("llama", FoldNorms(), LearnRotation(kinds=(kind,), steps=5))
    assert changed
    folded, _ = after("llama", FoldNorms())
    assert names(graph) == names(folded)
    keys = "".join(constant.key for constant in graph.constants.values())
    assert ("diagonal(" in keys) == (kind == "diagonal")


def test_a_learned_basis_rounds_better_than_a_random_one() -> None:
    graph, ctx = outliers()
    run_pipeline(graph, [FoldNorms()], ctx)
    random, learned = graph.clone(), graph.clone()
    run_pipeline(random, [RotateHadamard()], ctx)
    run_pipeline(learned, [LearnRotation(steps=50)], ctx)
    errors = [quantized_error(each, ctx) for each in (learned, random, graph)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1], errors


def test_scales_for_mixed_channels_help_behind_the_mixing() -> None:
    """The norm keeps its gain: each channel takes the size that suits its linears before all are mixed."""
    graph, ctx = outliers()
    mixed = RotateHadamard(stream=False, online=("linears",))
    learned = LearnRotation(kinds=("diagonal",), rate=0.05, online=True)
    errors = {}
    courses: dict[str, list[Pass]] = {
        "plain": [mixed],
        "learned": [learned, mixed],
        "smoothed": [SmoothActivations(measure="absmean"), mixed],
    }
    for name, steps in courses.items():
        clone = graph.clone()
        run_pipeline(clone, steps, ctx)
        errors[name] = quantized_error(clone, ctx, "linear_1")
    assert errors["learned"] < 0.7 * errors["plain"], errors
    assert errors["smoothed"] < 0.7 * errors["plain"], errors


def test_a_hidden_basis_is_found_again() -> None:
    """Outliers in a few channels, then the same function in a random basis of the stream: with the rotation learned, neither matters."""
    graph, ctx = outliers()
    hidden = graph.clone()
    run_pipeline(hidden, [FoldNorms()], ctx)
    (space,) = (space for space in find_spaces(hidden, Kind.ORTHOGONAL) if space.blocks == 1)
    q = torch.linalg.qr(torch.randn(space.size, space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    apply_basis_change(hidden, space, Orthogonal(q), ctx)
    mixing: list[Pass] = [SmoothActivations(measure="absmean"), RotateHadamard(stream=False, online=("linears",))]
    align = LearnRotation(kinds=("orthogonal",), online=True)
    errors = {}
    for name, program, steps in (("plain", graph, mixing), ("hidden", hidden, mixing), ("found", hidden, [align, *mixing])):
        clone = program.clone()
        run_pipeline(clone, steps, ctx)
        errors[name] = quantized_error(clone, ctx, "linear_1")
    assert errors["found"] < 0.7 * errors["hidden"], errors
    assert errors["found"] < 1.2 * errors["plain"], errors


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_aligned_stream_computes_the_same(family: str) -> None:
    after(family, LearnRotation(kinds=("orthogonal",), steps=3, online=True), SmoothActivations(measure="absmean"))


def test_a_stream_whose_axes_do_keeps_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.passes.learn_rotation._WORTH", 1.0)
    ctx = calibrated()
    graph, changed = after("llama", LearnRotation(kinds=("orthogonal",), steps=2, online=True), ctx=ctx)
    assert not changed
    assert graph.fingerprint() == family_graph("llama").fingerprint()
    assert any("its own axes do: other ones promise" in reason and chosen for _, _, reason, chosen in ctx.notes)


def test_the_same_seed_gives_the_same_basis() -> None:
    first, second, other = (after("llama", FoldNorms(), LearnRotation(steps=5, seed=seed))[0].fingerprint() for seed in (0, 0, 1))
    assert first == second != other


def test_a_basis_that_is_no_better_is_left_out() -> None:
    """Steps this large throw away whatever was there."""
    ctx = calibrated()
    graph, changed = after("llama", FoldNorms(), LearnRotation(kinds=("diagonal",), steps=1, rate=50.0), ctx=ctx)
    notes = [reason for where, _, reason, chosen in ctx.notes if where == "learn-rotation" and chosen]
    assert not changed
    assert set(notes) == {"no diagonal map makes its linears better"}
    assert "diagonal(" not in "".join(constant.key for constant in graph.constants.values())


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    ctx = calibrated()
    ctx.report = lambda label, done, total: told.append((label, done, total))
    after("llama", FoldNorms(), LearnRotation(kinds=("orthogonal",), steps=2), ctx=ctx)
    learning = [entry for entry in told if entry[0] == "learning orthogonal maps"]
    assert learning == [("learning orthogonal maps", done + 1, len(learning)) for done in range(len(learning))]
    assert learning


def test_schemes_that_round_nothing_are_left_alone() -> None:
    assert not after("llama", FoldNorms(), QUICK, ctx=calibrated(target="cpu-fp32"))[1]


def test_data_is_asked_for() -> None:
    with pytest.raises(SourceError, match="expected calibration data, got none"):
        QUICK.run(family_graph("llama").clone(), context("cpu-w4a8"))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (LearnRotation(kinds=("permutation",)), "option kinds: expected orthogonal and diagonal, got 'permutation'"),
        (LearnRotation(steps=0), "expected steps of at least 1 and a positive rate, got 0 and 0.02"),
        (LearnRotation(rate=-1.0), "expected steps of at least 1 and a positive rate, got 200 and -1"),
    ],
)
def test_mistakes_are_named(step: LearnRotation, message: str) -> None:
    with pytest.raises(PipelineError, match=f"learn-rotation: {message}"):
        step.run(family_graph("llama").clone(), calibrated())


def test_a_stream_that_stays_is_rotated_behind_its_norms() -> None:
    graph, _ = after("llama", SmoothActivations(measure="absmean"), RotateHadamard(stream=False, online=("linears",)))
    read = [node.args[0] for node in graph.calls(torch.ops.aten.linear.default)]
    per_layer = [hadamard] * 3 + [torch.ops.aten.reshape.default] + [hadamard] * 3
    assert [node.target for node in read[:7]] == per_layer  # type: ignore[union-attr]
    assert read[-1].target is not hadamard  # type: ignore[union-attr]  # the head stays in float


def test_a_stream_that_could_be_rotated_is_noted() -> None:
    ctx = calibrated()
    after("llama", FoldNorms(), RotateHadamard(stream=False), ctx=ctx)
    assert "stream=false" in [reason for where, _, reason, _ in ctx.notes if where == "rotate-hadamard"]


def test_without_heads_all_of_them_are_mixed_before_the_output() -> None:
    graph, _ = after("llama", RotateHadamard(stream=False, heads=False, online=("linears",)))
    read = [node.args[0] for node in graph.calls(torch.ops.aten.linear.default)]
    assert [node.target for node in read[:-1]] == [hadamard] * 14  # type: ignore[union-attr]


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(PipelineError, match="smooth-activations: option measure: expected absmax or absmean, got 'median'"):
        SmoothActivations(measure="median").run(family_graph("llama").clone(), calibrated())
