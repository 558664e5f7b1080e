"""Rotations learned from second moments: the formula is that of the best scales, and what is hidden is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.quant.learned_basis import Course
from qcompile.quant.moment_basis import MomentPair, learn_from_moments, mean_moment_noise, principal_axes

SIZE = 24


def pairs(basis: Tensor | None = None) -> list[MomentPair]:
    """Moments whose channels differ much in size, seen in a basis."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.eye(SIZE) if basis is None else basis
    found = []
    for _ in range(4):
        scales = torch.logspace(2, -1, SIZE) * (1 + 0.2 * torch.rand(SIZE, generator=generator))
        inputs = torch.randn(200, SIZE, generator=generator) * scales
        weight = torch.randn(64, SIZE, generator=generator) * torch.logspace(-1, 1, SIZE)
        inputs, weight = inputs @ turn.T, weight @ turn.T
        found.append(MomentPair(inputs.T @ inputs / 200, weight.T @ weight))
    return found


def random_basis() -> Tensor:
    return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))).Q


def test_the_noise_is_that_of_the_best_scales() -> None:
    pair = pairs()[0]
    expected = pair.noise(torch.eye(SIZE))[0] * pair.signal * SIZE
    scale = (pair.weights.diagonal() / pair.inputs.diagonal()) ** 0.25

    def product(d: Tensor) -> Tensor:
        return (pair.inputs.diagonal() * d**2).sum() * (pair.weights.diagonal() / d**2).sum()

    torch.testing.assert_close(product(scale), expected)
    for seed in range(5):
        other = scale * torch.exp(0.1 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)))
        assert product(other) > expected


def test_the_gradient_is_right() -> None:
    pair, rotation = pairs()[0], random_basis().double()
    wide = MomentPair(pair.inputs.double(), pair.weights.double())
    direction = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-6
    ahead, behind = (float(wide.noise(rotation + sign * step * direction)[0]) for sign in (1, -1))
    assert (ahead - behind) / (2 * step) == pytest.approx(float((wide.noise(rotation)[1] * direction).sum()), rel=1e-5)


def test_a_hidden_basis_is_found_from_its_principal_axes() -> None:
    plain, hidden = pairs(), pairs(random_basis())
    told: list[tuple[int, int]] = []
    learned = learn_from_moments(hidden, principal_axes(hidden), Course(100, 0.02, 4), lambda *at: told.append(at))
    torch.testing.assert_close(learned @ learned.T, torch.eye(SIZE), rtol=0, atol=1e-4)
    own, lost, found = (
        mean_moment_noise(plain, torch.eye(SIZE)),
        mean_moment_noise(hidden, torch.eye(SIZE)),
        mean_moment_noise(hidden, learned),
    )
    assert found < 1.1 * own < 0.2 * lost
    assert told == [(step + 1, 100) for step in range(100)]


def test_principal_axes_do_not_depend_on_the_basis() -> None:
    turn = random_basis()
    there = (principal_axes(pairs(turn)) @ turn).abs()
    torch.testing.assert_close(there[:6], principal_axes(pairs()).abs()[:6], rtol=0, atol=1e-2)


def test_directions_without_energy_do_no_harm() -> None:
    """What a layer norm has centred has none along the vector of ones."""
    centre = torch.eye(SIZE) - torch.full((SIZE, SIZE), 1 / SIZE)
    flat = [MomentPair(centre @ pair.inputs @ centre, pair.weights) for pair in pairs()]
    start = principal_axes(flat)
    learned = learn_from_moments(flat, start, Course(100, 0.02, 4))
    torch.testing.assert_close(learned @ learned.T, torch.eye(SIZE), rtol=0, atol=1e-4)
    assert mean_moment_noise(flat, learned) < mean_moment_noise(flat, start)
