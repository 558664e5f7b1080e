"""Scales per channel: smoothing, salient weights, keys. Exact on every family, and each lowers the error that it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import PipelineError, SourceError
from qcompile.ir.constants import tensor_constant
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.manager import run_pipeline
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.passes.scale_keys import ScaleKeys
from qcompile.passes.scale_salient_weights import ScaleSalientWeights
from qcompile.passes.smooth_activations import SmoothActivations
from qcompile.passes.statistics import Request
from tests.passes.basis_cases import after, calibrated, weight_error, with_data
from tests.passes.helpers import Gated, capture, context, names
from tests.passes.space_cases import FAMILIES, canonical, family_graph

aten = torch.ops.aten


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_keeps_the_function(family: str) -> None:
    assert after(family, SmoothActivations())[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "mixtral", "vit"])
def test_searches_keep_the_function(family: str) -> None:
    after(family, SmoothActivations(alpha="search"), ScaleSalientWeights(steps=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_keys_keeps_the_function(family: str) -> None:
    graph, changed = after(family, ScaleKeys())
    assert changed == bool(graph.calls(torch.ops.qcompile.attention.default))


class TwoHot(nn.Module):
    """A gated layer whose norm lets two channels through thirty times larger, and whose up projection writes two such."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.inner = nn.Linear(64, 64), Gated(64, 128)
        with torch.no_grad():
            self.inner.norm.weight.fill_(1.0)
            self.inner.norm.weight[[9, 33]] = 30.0
            self.inner.gate.weight[:, [9, 33]] /= 10
            self.inner.up.weight[[5, 77]] *= 30

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def hot(target: str = "cpu-w4a8") -> tuple[Graph, PassContext]:
    inputs = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    graph = canonical(capture(TwoHot(), inputs[0]))
    graph.interface.examples["x"] = inputs[1]
    return graph, with_data([{"x": sample} for sample in inputs], target)


def error_with(*passes: Pass, target: str, rounding: tuple[Pass, ...] = ()) -> float:
    graph, ctx = hot(target)
    expected = outputs(graph, wide=True)
    run_pipeline(graph, [*passes, *rounding], ctx)
    return weight_error(graph, expected)


@pytest.mark.parametrize("alpha", ["0.5", "search"])
def test_smoothing_lowers_the_error_of_quantized_activations(alpha: str) -> None:
    rounding = (QuantizeActivations(),)
    plain = error_with(target="cpu-w4a8", rounding=rounding)
    assert error_with(SmoothActivations(alpha=alpha), target="cpu-w4a8", rounding=rounding) < 0.8 * plain


def test_salient_weights_lower_the_error_of_quantized_weights() -> None:
    plain = error_with(target="cpu-int4")
    assert error_with(ScaleSalientWeights(), target="cpu-int4") < 0.8 * plain


def test_smoothing_evens_out_what_linears_read() -> None:
    graph, ctx = hot()
    down = str(graph.calls(aten.linear.default)[-1].args[0])
    request = Request(down, "absmax")
    before = ctx.statistics(graph, [request])[request]
    run_pipeline(graph, [SmoothActivations()], ctx)
    now = ctx.statistics(graph, [request])[request]
    assert now.max() / now.median() < 0.5 * before.max() / before.median()


def test_keys_lose_their_outlier_channels() -> None:
    graph = family_graph("llama").clone()
    weight = "model.layers.0.self_attn.k_proj.weight"
    planted = graph.constants[weight].materialize().clone()
    planted[[3, 8 + 5]] *= 20  # channel 3 of the first key head and 5 of the second; their planes' partners are 7 and 1
    graph.bind(weight, tensor_constant(planted))
    ctx, expected = calibrated(), outputs(graph, wide=True)
    request = Request("linear_1", "absmax")
    before = ctx.statistics(graph, [request])[request].view(2, 8)
    run_pipeline(graph, [ScaleKeys()], ctx)
    now = ctx.statistics(graph, [request])[request].view(2, 8)
    assert relative_error(outputs(graph, wide=True), expected) <= 1e-9
    for head, channel, partner in ((0, 3, 7), (1, 5, 1)):
        shrunk = now[head] / before[head]
        assert shrunk[channel] == pytest.approx(shrunk[partner].item(), rel=1e-5)
        assert now[head].max() / now[head].median() < 0.5 * before[head].max() / before[head].median()


def test_scales_follow_rotations_and_the_other_way_round() -> None:
    after("llama", SmoothActivations(), FoldNorms(), RotateHadamard(), ScaleKeys())
    after("llama", FoldNorms(), RotateHadamard(online=("linears", "keys")), SmoothActivations())


def test_rotated_keys_are_no_place_for_scales() -> None:
    """Behind an online rotation a diagonal on keys would have to pass it."""
    ctx = calibrated()
    assert not after("llama", RotateHadamard(online=("keys",)), ScaleKeys(), ctx=ctx)[1]
    noted = [(node, reason) for where, node, reason, _ in ctx.notes if where == "scale-keys"]
    assert noted[0] == ("keys of attention", "no scale passes between them and what makes them")


def test_what_searches_leave_alone_is_noted() -> None:
    ctx = calibrated()
    after("llama", ScaleSalientWeights(steps=2), ctx=ctx)
    noted = {node: reason for where, node, reason, _ in ctx.notes if where == "scale-salient-weights"}
    assert "no linear that the scheme rounds reads it" in noted.values()  # the head's


def test_float_schemes_are_left_alone() -> None:
    graph = family_graph("llama").clone()
    before = names(graph)
    assert not ScaleSalientWeights().run(graph, calibrated(target="cpu-fp32"))
    assert not SmoothActivations(alpha="search").run(graph, calibrated(target="cpu-fp32"))
    assert names(graph) == before


def test_mistakes_are_named() -> None:
    graph = family_graph("llama").clone()
    with pytest.raises(PipelineError, match="smooth-activations: option alpha: expected a number between 0 and 1 or search, got 'much'"):
        SmoothActivations(alpha="much").run(graph, calibrated())
    with pytest.raises(PipelineError, match="scale-keys: option alpha: expected a number above 0 and at most 1, got 2"):
        ScaleKeys(alpha=2.0).run(graph, calibrated())
    with pytest.raises(PipelineError, match="scale-salient-weights: option steps: expected at least 1, got 0"):
        ScaleSalientWeights(steps=0).run(graph, calibrated())
    for step in (SmoothActivations(), ScaleSalientWeights(), ScaleKeys()):
        with pytest.raises(SourceError, match="expected calibration data, got none"):
            step.run(graph, context("cpu-w4a8"))
