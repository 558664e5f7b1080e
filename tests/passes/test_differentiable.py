"""Gradients through a graph in segments are those of the whole; tested against plain autograd in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes import substitutes
from qcompile.passes.calibration import batches, make_calibration
from qcompile.passes.differentiable import Differentiable
from qcompile.passes.divergence import TokenDivergence, divergence
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.selection import find_heads
from tests.models import tiny
from tests.passes.helpers import RmsNorm, capture, context


class Block(nn.Module):
    """A residual block with a norm and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = RmsNorm(16), nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Deep(nn.Module):
    """Eight blocks, the first weight used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.again = nn.ModuleList(Block() for _ in range(8)), nn.Linear(16, 24)
        self.again.weight = self.blocks[0].gate.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.again(x)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substitutes, "has_bfloat16_units", lambda: False)


def prepared(module: nn.Module, sample: Tensor) -> tuple[Graph, Any]:
    """A graph after the exact passes, and its inputs."""
    graph = capture(module, sample)
    ctx = context()
    run_pipeline(graph, default_pipeline(ctx.target)[:4], ctx)
    return graph, batches(make_calibration([sample], Assets()), graph)


def test_gradients_in_segments_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    module, x, slope = Deep(), torch.randn(3, 5, 16), torch.randn(3, 5, 24)
    graph, inputs = prepared(module, x)
    trained = {str(node.args[1].target) for node in graph.calls(torch.ops.aten.linear.default)}
    end = graph.calls(torch.ops.aten.linear.default)[-1].name
    program = Differentiable(graph, [end], trained, inputs)
    assert len(program.segments) >= 4
    weights = {name: graph.constants[name].materialize() for name in trained}
    kept = program.forward(0, weights)
    torch.testing.assert_close(program.results(kept)[0], module(x), rtol=1e-5, atol=1e-5)
    found = dict(program.backward(0, weights, kept, [slope]))
    module(x).backward(slope)
    expected = dict(module.named_parameters(remove_duplicate=False))
    assert set(found) == trained
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_a_weight_may_be_changed_as_soon_as_its_gradient_is_there() -> None:
    torch.manual_seed(0)
    module, x, slope = Deep(), torch.randn(3, 5, 16), torch.randn(3, 5, 24)
    graph, inputs = prepared(module, x)
    trained = {str(node.args[1].target) for node in graph.calls(torch.ops.aten.linear.default)}
    program = Differentiable(graph, [graph.calls(torch.ops.aten.linear.default)[-1].name], trained, inputs)
    weights = {name: graph.constants[name].materialize() for name in trained}
    kept = program.forward(0, weights)
    whole = dict(program.backward(0, weights, kept, [slope]))
    for name, gradient in program.backward(0, weights, kept, [slope]):
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=0)
        weights[name] = torch.full_like(weights[name], torch.nan)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_the_divergence_of_a_language_model_falls_along_its_gradient(family: str) -> None:
    """Central differences of the divergence, before and after its attention was given a cache."""
    torch.manual_seed(0)
    loaded = load(tiny(family))
    ctx = context()
    run_pipeline(loaded.graph, default_pipeline(ctx.target)[:5], ctx)
    graph = loaded.graph
    heads = find_heads(graph)
    trained = {str(node.args[1].target) for node in graph.calls(torch.ops.aten.linear.default) if node not in heads}
    inputs = batches(make_calibration(torch.randint(0, 100, (2, 12)), loaded.assets), graph)
    judge = divergence(graph, heads)
    assert isinstance(judge, TokenDivergence)
    program = Differentiable(graph, judge.ends, trained, inputs)
    exact = {name: graph.constants[name].materialize().float() for name in sorted(trained)}
    wanted = program.results(program.forward(0, exact))
    weights = {name: value + 0.02 * torch.randn_like(value) for name, value in exact.items()}

    def distance(shift: float, along: dict[str, Tensor]) -> float:
        moved = {name: value + shift * along[name] for name, value in weights.items()}
        return judge(program.results(program.forward(0, moved)), wanted, None)[0]

    kept = program.forward(0, weights)
    _, slopes = judge(program.results(kept), wanted, None)
    gradients = dict(program.backward(0, weights, kept, slopes))
    assert set(gradients) == trained
    along = {name: gradient / gradient.norm() for name, gradient in gradients.items()}
    expected = sum(float((gradients[name] * along[name]).sum()) for name in trained)
    assert (distance(1e-3, along) - distance(-1e-3, along)) / 2e-3 == pytest.approx(expected, rel=0.02)  # curvature and float32
    assert distance(0.0, along) > 0
    assert judge(wanted, wanted, None)[0] == pytest.approx(0.0, abs=1e-6)
