"""Attention around a softmax becomes one operator where it computes what the operator computes, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.ir.graph import Graph
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.raise_patterns import RaisePatterns
from tests.passes.helpers import assert_same_function, capture, run

attend = torch.ops.qcompile.attention.default
Q, K = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
KEEP = torch.ones(6, 6, dtype=torch.bool).tril()


class Spelled(nn.Module):
    """Attention in the words of a test."""

    def __init__(self, words: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words = words

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.words(q, k, v)


def raised(words: Callable[[Tensor, Tensor, Tensor], Tensor], k: Tensor = K) -> Graph:
    graph = capture(Spelled(words), Q, k, k.flip(0).clone())
    before = graph.clone()
    run(graph, Canonicalize(), RaisePatterns())
    assert_same_function(before, graph)
    return graph


def repeated(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(x.shape[0], 2, 2, 6, 8).reshape(x.shape[0], 4, 6, 8)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeated(k).transpose(-1, -2) * 0.3
    return (scores + torch.where(KEEP, 0.0, -3e38)).softmax(-1) @ repeated(v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5.0 * torch.tanh(q @ repeated(k).transpose(-1, -2) * 0.3 / 5.0)
    return torch.softmax(torch.where(KEEP, scores, -1e30), -1) @ repeated(v)


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.6) @ (repeated(k).transpose(-1, -2) * 0.6)).softmax(-1) @ repeated(v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.reshape(-1, 2, 2, 6, 8) @ k.unsqueeze(2).transpose(-1, -2)).reshape(-1, 4, 6, 6) / 2.0
    weights = torch.where(KEEP, torch.where(KEEP, scores, -1e30).softmax(-1), 0.0)
    return (weights.reshape(-1, 2, 2, 6, 6) @ v.unsqueeze(2)).reshape(-1, 4, 6, 8)


@pytest.mark.parametrize(
    ("words", "scale", "softcap"), [(eager, 0.3, 0.0), (capped, 0.3, 5.0), (scaled_before, 0.36, 0.0), (grouped, 0.5, 0.0)]
)
def test_each_spelling_is_one_attention_over_heads_as_they_are_stored(words: Any, scale: float, softcap: float) -> None:
    graph = raised(words)
    (attention,) = graph.calls(attend)
    assert attention.args[:3] == tuple(graph.placeholders)  # two key heads for four of queries
    assert attention.args[5] == pytest.approx(scale, abs=1e-9)
    assert attention.args[6:] == (False, 0, softcap)
    assert not graph.calls(torch.ops.aten.softmax.int, torch.ops.aten.matmul.default)


@pytest.mark.parametrize(
    "words",
    [
        lambda q, k, v: (q @ repeated(k).transpose(-1, -2)).softmax(-2) @ repeated(v),  # over queries
        lambda q, k, v: (q @ repeated(k).transpose(-1, -2)).softmax(-1).square() @ repeated(v),
        lambda q, k, v: (q.exp() @ repeated(k).transpose(-1, -2)).softmax(-1).transpose(-1, -2) @ repeated(v),
        lambda q, k, v: (q @ repeated(k).transpose(-1, -2) + q @ repeated(v).transpose(-1, -2)).softmax(-1).relu() @ repeated(v),
    ],
)
def test_what_only_looks_like_attention_is_left_alone(words: Any) -> None:
    assert not raised(words).calls(attend)


def test_heads_in_another_order_are_not_taken_for_repeated_ones() -> None:
    graph = raised(lambda q, k, v: (q @ k.repeat(1, 2, 1, 1).transpose(-1, -2)).softmax(-1) @ repeated(v))
    (attention,) = graph.calls(attend)
    assert [part.meta["val"].shape[1] for part in attention.args[:3]] == [4, 4, 4]  # type: ignore[union-attr]
