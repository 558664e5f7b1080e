"""Losses whose shares are known: quadratic games, where the mean of off and alone is the Shapley value."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from qcompile.passes.attribution import attribute, halves, usual_budget


class Game:
    """The energy of the summed errors [n, K] of those who are on, and how often it was asked for."""

    def __init__(self, errors: Tensor) -> None:
        self.errors, self.asked = errors.double(), 0
        self.everyone = tuple(range(len(errors)))

    def __call__(self, off: frozenset[int]) -> float:
        self.asked += 1
        return float(self.errors[[member for member in self.everyone if member not in off]].sum(0).square().sum())


def test_shares_are_shapley_values_and_add_up() -> None:
    game = Game(torch.randn(4, 6))
    found = attribute([game.everyone], game, [0, 0, 1, 1], 100)
    shares = {blamed.members: blamed.share for blamed in found.groups}
    orders = list(permutations(game.everyone))
    for member in game.everyone:
        joins = [game(frozenset(order[order.index(member) + 1 :])) - game(frozenset(order[order.index(member) :])) for order in orders]
        assert shares[(member,)] == pytest.approx(sum(joins) / len(orders), rel=1e-9)
    assert sum(shares.values()) == pytest.approx(found.total - found.floor, rel=1e-9)
    assert sum(blamed.off for blamed in found.groups) != pytest.approx(found.total, rel=0.05)


def test_one_culprit_is_found_in_few_evaluations() -> None:
    errors = torch.zeros(64, 64)
    errors[37, 37] = 1.0
    game = Game(errors)
    found = attribute([game.everyone], game, [0] * 64, 1000)
    assert (found.groups[0].members, found.groups[0].off, found.groups[0].alone) == ((37,), 1.0, 1.0)
    assert found.evaluations == game.asked <= 2 + 4 * math.log2(64)


@pytest.mark.parametrize("budget", [4, 17, 50, 10_000])
def test_a_budget_holds_and_groups_stay_together(budget: int) -> None:
    game = Game(torch.eye(32))
    found = attribute([tuple(range(20)), tuple(range(20, 32))], game, [place // 4 for place in range(32)], budget)
    assert found.evaluations == game.asked <= min(budget, usual_budget(32, 10_000))
    assert sorted(member for blamed in found.groups for member in blamed.members) == list(range(32))
    assert sum(blamed.share for blamed in found.groups) == pytest.approx(32.0)


def test_groups_are_halved_between_layers_first() -> None:
    layers = [0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert halves(tuple(range(9)), layers) == [(0, 1, 2), (3, 4, 5, 6, 7, 8)]
    assert halves((3, 4, 5, 6, 7, 8), layers) == [(3, 4, 5, 6, 7), (8,)]
    assert halves((3, 4, 5), layers) == [(3,), (4, 5)]
    assert halves((3,), layers) == [(3,)]


def test_the_usual_budget_is_bounded() -> None:
    assert [usual_budget(count, 256) for count in (1, 2, 24, 210)] == [8, 8, 111, 256]
