"""Steps of learned roundings: their length, and what measures it."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.rounding.descent import Descent


def test_alike_a_value_moves_in_proportion_to_its_gradient() -> None:
    values, slope = torch.zeros(2, 2), torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    Descent(values, 0.1, alike=True).step(slope, 0.5)
    torch.testing.assert_close(values, -0.05 * slope / slope.square().mean().sqrt())


def test_else_each_moves_by_the_rate_against_its_sign() -> None:
    values, slope = torch.zeros(4), torch.tensor([3.0, -1e-3, 1e-9, 0.0])
    Descent(values, 0.1, alike=False).step(slope, 0.5)
    torch.testing.assert_close(values, torch.tensor([-0.05, 0.05, -0.05, 0.0]))


@pytest.mark.parametrize("alike", [True, False])
def test_gradients_that_disagree_move_less_than_those_that_agree(alike: bool) -> None:
    moved = []
    for signs in ((1, 1, 1, 1), (1, -1, 1, -1)):
        values = torch.zeros(8)
        path = Descent(values, 0.01, alike=alike)
        for sign in signs:
            path.step(torch.full((8,), 2.5 * sign), 1.0)
        moved.append(float(values.abs().max()))
    assert moved[0] == pytest.approx(0.04)
    assert moved[1] < 0.5 * moved[0]


def test_without_gradients_nothing_moves() -> None:
    for alike in (True, False):
        values = torch.ones(3)
        Descent(values, 1.0, alike=alike).step(torch.zeros(3), 1.0)
        assert values.tolist() == [1.0, 1.0, 1.0]
