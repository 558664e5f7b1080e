"""Learning a basis: the expected noise is the noise that comes, and descent finds what is known to be best."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from qcompile.quant import activations
from qcompile.quant.hadamard import fast_hadamard, random_orthogonal
from qcompile.quant.learned_basis import Course, Grid, Reading, learn_diagonal, learn_orthogonal, mean_noise, rotating, scaling

INT8, INT4 = Grid(8), Grid(4, 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(grid: Grid | None = INT8, weights: Grid | None = INT4) -> Reading:
    """Linears of 32 channels, some of which are large where the weights are small."""
    sizes = torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(3))]
    return Reading(normal(256, 32) * sizes, normal(96, 32, seed=1) / sizes.sqrt(), ((0, 0),), grid, weights)


def rounded(x: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        codes, scale = activations.quantize(x, grid.bits, grid.group_size)
        return activations.dequantize(codes, scale, None, grid.group_size, x.dtype)
    return activations.dequantize(*activations.quantize_asymmetric(x, grid.bits, grid.group_size), grid.group_size, x.dtype)


@pytest.mark.parametrize("grid", [Grid(8), Grid(6, 16), Grid(8, 24), Grid(6, -1, symmetric=False), Grid(7, 16, symmetric=False)])
def test_the_variance_is_that_of_rounding(grid: Grid) -> None:
    """But for the extremes of each group, which are rounded exactly."""
    x = normal(4000, 64)
    expected = (grid.variance(x).repeat_interleave(64 if grid.group_size == -1 else grid.group_size, 1)[:, :64]).mean()
    ratio = float((rounded(x, grid) - x).square().mean() / expected)
    assert 0.98 - 2 / (64 if grid.group_size == -1 else 16) < ratio < 1.02


def test_a_static_step_is_that_of_the_largest_row() -> None:
    x = normal(10, 8) * torch.arange(1, 11).unsqueeze(1)
    shared = Grid(8, shared=True).variance(x)
    assert shared.shape == (1, 1)
    assert shared[0, 0] == Grid(8).variance(x).max()


def test_a_clip_shrinks_the_step() -> None:
    torch.testing.assert_close(Grid(8, clip=0.5).variance(normal(4, 8)), Grid(8).variance(normal(4, 8)) / 4)


def test_the_noise_is_the_error_of_the_outputs() -> None:
    reading = Reading(normal(256, 64), normal(96, 64, seed=1), ((0, 0),), Grid(6), Grid(6, 32))
    assert reading.input_grid is not None
    assert reading.weight_grid is not None
    wanted = reading.inputs @ reading.weight.T
    found = rounded(reading.inputs, reading.input_grid) @ rounded(reading.weight, reading.weight_grid).T
    error = (found - wanted).square().mean() / wanted.square().mean()
    assert float(reading.noise(reading.inputs, reading.weight) / error) == pytest.approx(1, abs=0.05)


def test_operands_that_are_not_rounded_make_no_noise() -> None:
    both, inputs, weights = (uneven(*grids) for grids in ((INT8, INT8), (INT8, None), (None, INT8)))
    parts = [float(reading.noise(reading.inputs, reading.weight)) for reading in (inputs, weights)]
    assert min(parts) > 0
    assert float(both.noise(both.inputs, both.weight)) == pytest.approx(sum(parts))
    assert float(uneven(None, None).noise(both.inputs, both.weight)) == 0


def test_readings_are_drawn_equally_often() -> None:
    course = Course(steps=6, readings=2, seed=1)
    drawn = [(tuple(indices), share) for indices, share in course.draws(4)]
    assert Counter(index for indices, _ in drawn for index in indices) == dict.fromkeys(range(4), 3)
    assert [share for _, share in drawn] == [1 - step / 6 for step in range(6)]
    assert drawn == [(tuple(indices), share) for indices, share in course.draws(4)]


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_learned_rotation_is_orthogonal_and_better_than_its_start(blocks: int) -> None:
    size = 32 // blocks
    runs = tuple((block * size, block) for block in range(blocks))
    readings = [Reading(uneven().inputs, uneven().weight, runs, Grid(4), Grid(4, 16))]
    start = torch.stack([random_orthogonal(size, seed).float() for seed in range(blocks)])
    seen: list[tuple[int, int]] = []
    learned = learn_orthogonal(readings, start, Course(steps=100, rate=0.05), lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(learned @ learned.mT, torch.eye(size).expand(blocks, -1, -1), atol=1e-4, rtol=0)
    assert mean_noise(readings, rotating(learned)) < 0.9 * mean_noise(readings, rotating(start))
    assert seen == [(step, 100) for step in range(1, 101)]


def test_columns_outside_the_runs_stay() -> None:
    reading = Reading(normal(4, 12), normal(6, 12), ((8, 1), (2, 0)), INT8, None)
    maps = torch.stack([random_orthogonal(4, seed).float() for seed in (1, 2)])
    moved = rotating(maps)(reading.inputs, reading, False)
    torch.testing.assert_close(moved[:, 2:6], reading.inputs[:, 2:6] @ maps[0].T)
    torch.testing.assert_close(moved[:, 8:], reading.inputs[:, 8:] @ maps[1].T)
    assert torch.equal(moved[:, [0, 1, 6, 7]], reading.inputs[:, [0, 1, 6, 7]])


def test_a_scale_behind_a_mixing_becomes_the_geometric_mean() -> None:
    """Mixed channels share their noise: `tr(D S D) · tr(D⁻¹ WᵀW D⁻¹)` is least where `d² = |w_j| / |x_j|`."""
    reading = uneven(Grid(4), Grid(4))
    known = ((reading.weight.square().sum(0) / reading.inputs.square().sum(0)) ** 0.25).log()

    def mixed(rows: Tensor) -> Tensor:
        return fast_hadamard(rows, None, 32)

    learned = learn_diagonal([reading], torch.zeros(32), 1, Course(steps=200, rate=0.05), mixed)
    start, best, found = (float(mean_noise([reading], scaling(each, 1, mixed))) for each in (torch.zeros(32), known, learned))
    assert best < 0.7 * start
    assert found < start - 0.95 * (start - best)


def test_scaling_divides_the_weights() -> None:
    reading = uneven()
    move = scaling(torch.linspace(-1, 1, 32), 1)
    product = move(reading.inputs, reading, False) @ move(reading.weight, reading, True).T
    torch.testing.assert_close(product, reading.inputs @ reading.weight.T, rtol=1e-4, atol=1e-3)
