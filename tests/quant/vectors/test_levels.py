"""Levels by Lloyd's rounds: sorted, never worse than uniform ones, exact where there are enough of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.quant.vectors.levels import lloyd_levels, nearest_level


def error(samples: torch.Tensor, levels: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    squares = (samples.double() - levels.double()[nearest_level(samples, levels).long()]).square()
    return float((squares if weights is None else squares * weights).mean())


def test_levels_of_a_normal_distribution_are_those_of_max_1960() -> None:
    places = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    samples = 2**0.5 * torch.erfinv(2 * places - 1)
    found = lloyd_levels(samples, 8)
    torch.testing.assert_close(found[4:], torch.tensor([0.2451, 0.7560, 1.3439, 2.1520]), rtol=0, atol=4e-3)
    assert abs(error(samples, found) - 0.03454) < 2e-4


@given(st.integers(0, 99), st.integers(2, 16), st.floats(0.3, 4.0))
def test_levels_ascend_and_are_never_worse_than_uniform_ones(seed: int, count: int, skew: float) -> None:
    samples = torch.randn(500, generator=torch.Generator().manual_seed(seed))
    samples = samples.sign() * samples.abs() ** skew + samples
    found = lloyd_levels(samples, count)
    assert (found.diff() >= 0).all()
    low, high = samples.aminmax()
    uniform = low + (high - low) * (torch.arange(count) + 0.5) / count
    assert error(samples, found) <= error(samples, uniform) * (1 + 1e-4)
    assert torch.equal(found, lloyd_levels(samples.flip(0), count))


@given(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=40), st.integers(1, 16))
def test_as_many_levels_as_distinct_samples_are_exact(values: list[float], count: int) -> None:
    samples = torch.tensor(values)
    found = lloyd_levels(samples, count)
    assert found.shape == (count,)
    if len(samples.unique()) <= count:
        assert torch.equal(found[nearest_level(samples, found).long()], samples)


def test_heavy_samples_draw_the_levels() -> None:
    samples = torch.linspace(-1, 1, 1001)
    weights = 1 + 1000 * (samples > 0.8).double()
    plain, weighted = lloyd_levels(samples, 8), lloyd_levels(samples, 8, weights)
    assert (weighted > 0.8).sum() > (plain > 0.8).sum()
    assert error(samples, weighted, weights) < 0.5 * error(samples, plain, weights)


def test_codes_are_of_the_nearest_level_and_ties_go_down() -> None:
    levels = torch.tensor([-1.0, 0.0, 2.0])
    assert nearest_level(torch.tensor([-9.0, -0.5, -0.4, 1.0, 1.01]), levels).tolist() == [0, 0, 1, 1, 2]
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_level(x.T, levels), nearest_level(x, levels).T)
