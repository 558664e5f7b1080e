"""Runs that start from kept values give what whole runs give, and compute less; distances against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qcompile.ir.graph import Graph
from qcompile.passes.output_distance import OutputNoise, TokenKl
from qcompile.passes.switched_run import Room, SwitchedRun
from tests.passes.building import Builder, aten

LAYERS = 6


class OneBatch:
    """The graph's example as the only batch."""

    def __init__(self, graph: Graph) -> None:
        self._examples = graph.interface.examples

    def __len__(self) -> int:
        return 1

    def tensor(self, placeholder: str, batch: int) -> Tensor:
        """The example."""
        return self._examples[placeholder]

    def real(self, batch: int) -> Tensor | None:
        """No padding."""


def chain() -> tuple[Graph, list[dict[str, str]], list[str]]:
    """Layers x -> x + relu(x W), each with another weight to switch to; and the first node of each layer."""
    build = Builder(8)
    x, pairs, starts = build.x, [], []
    for _ in range(LAYERS):
        weight, other = build.constant(8, 8), build.constant(8, 8)
        linear = build.call(aten.linear.default, x, weight)
        x = build.call(aten.add.Tensor, x, build.call(aten.relu.default, linear))
        pairs.append({weight.name: other.name})
        starts.append(linear.name)
    graph = build.graph
    graph.output.args = ((x,),)
    return graph, pairs, starts


@pytest.mark.parametrize("room", [Room(), Room(weights=0, values=0)])
def test_what_is_kept_changes_no_number(room: Room) -> None:
    graph, pairs, starts = chain()
    fresh = SwitchedRun(graph, pairs, {}, OneBatch(graph))
    kept = SwitchedRun(graph, pairs, {}, OneBatch(graph), room)
    everyone = frozenset(range(LAYERS))
    assert torch.equal(kept.keep(frozenset(), starts)[0][0], fresh.run(frozenset())[0][0])
    assert torch.equal(kept.keep(everyone, starts)[0][0], fresh.run(everyone)[0][0])
    for off in (frozenset({0}), frozenset({5}), frozenset({2, 3}), everyone - {4}, frozenset({0, 5})):
        assert torch.equal(kept.run(off)[0][0], fresh.run(off)[0][0]), off


def test_only_what_a_switch_changes_is_computed() -> None:
    graph, pairs, starts = chain()
    run = SwitchedRun(graph, pairs, {}, OneBatch(graph))
    run.keep(frozenset(), starts)
    whole = run.computed
    run.keep(frozenset(range(LAYERS)), starts)
    for off, layers in ((frozenset({5}), 1), (frozenset({2, 4}), 4), (frozenset(range(5)), 1), (frozenset({0}), 5)):
        before = run.computed
        run.run(off)
        assert run.computed - before == whole * layers // LAYERS, off


def test_the_divergence_is_that_of_its_definition() -> None:
    wanted = torch.randn(2, 5, 40) * 4
    for found in (wanted + 0.01 * torch.randn_like(wanted), torch.randn_like(wanted) * 4, wanted.flip(-1) * 30):
        log_p, log_q = (item[:, :-1].double().log_softmax(-1) for item in (wanted, found))
        expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert TokenKl([[wanted[:1]], [wanted[1:]]])([[found[:1]], [found[1:]]]) == pytest.approx(expected, rel=1e-4)
    assert TokenKl([[wanted]])([[wanted]]) == pytest.approx(0.0, abs=1e-12)
    assert math.isinf(TokenKl([[wanted]])([[wanted * math.nan]]))


def test_tokens_that_the_reference_excludes_cost_nothing() -> None:
    wanted, found = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    wanted[..., 3] = -math.inf
    assert TokenKl([[wanted]])([[found]]) == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_noise_is_a_share_of_the_energy() -> None:
    wanted = [torch.tensor([3.0, 4.0]), torch.tensor([1, 2])]
    assert OutputNoise([wanted])([[wanted[0] + torch.tensor([0.0, 1.0]), wanted[1]]]) == pytest.approx(1 / 25)
