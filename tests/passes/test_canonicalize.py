"""canonicalize, remove-dead-code, fold-constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.remove_dead_code import RemoveDeadCode
from tests.passes.helpers import assert_same_function, capture, names, run

aten = torch.ops.aten


class Spellings(nn.Module):
    """Three spellings of a linear, no-op casts, a copy, a full slice, neutral arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32).clone().contiguous()[:, :] + 0
        y = torch.addmm(self.bias, x, self.a) * 1.0
        z = torch.matmul(y, self.b.t())
        return x + nn.functional.linear(torch.dropout(z.view(-1, 8), 0.5, False), self.c)


def test_one_spelling_is_left() -> None:
    graph = capture(Spellings(), torch.randn(3, 8))
    before = graph.clone()
    run(graph, Canonicalize(), RemoveDeadCode())
    assert names(graph) == ["aten.linear"] * 3 + ["aten.add.Tensor"]
    assert_same_function(before, graph)
    assert all(len(node.args) == 3 for node in graph.calls(aten.linear.default))


def test_a_transposed_weight_is_a_log_entry_and_not_a_copy() -> None:
    graph = capture(Spellings(), torch.randn(3, 8))
    run(graph, Canonicalize(), RemoveDeadCode())
    weights = [graph.constant(node.args[1]) for node in graph.calls(aten.linear.default)]
    assert [[str(step) for step in weight.transforms] for weight in weights if weight] == [["permute(1, 0)"], [], []]


def test_a_second_run_changes_nothing() -> None:
    graph = capture(Spellings(), torch.randn(3, 8))
    run(graph, Canonicalize())
    text = graph.text()
    run(graph, Canonicalize())
    assert graph.text() == text


def test_fuel_stops_a_pass_in_the_middle() -> None:
    from qcompile.passes.base import PassContext
    from qcompile.target import parse_target

    graph = capture(Spellings(), torch.randn(3, 8))
    before = graph.clone()
    ctx = PassContext(parse_target("cpu-fp32"), fuel=2)
    assert Canonicalize().run(graph, ctx)
    graph.verify()
    assert len(names(graph)) > 4
    assert_same_function(before, graph)


class Constants(nn.Module):
    """Arithmetic on constants only, beside a weight too large to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
        self.large = nn.Parameter(torch.randn(3, 700))

    def forward(self, x: Tensor) -> Tensor:
        gain = torch.sqrt(self.scale * 3.0 + 1.0)
        return x * gain + (self.large * 2.0).sum()


def test_constant_arithmetic_is_folded_and_large_weights_stay_lazy() -> None:
    graph = capture(Constants(), torch.randn(2, 3))
    before = graph.clone()
    run(graph, FoldConstants(limit=4096), RemoveDeadCode())
    assert names(graph) == ["aten.mul.Tensor", "aten.mul.Tensor", "aten.sum", "aten.add.Tensor"]
    assert_same_function(before, graph)
