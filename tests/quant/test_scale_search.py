"""Scales per channel: the error that they are chosen by is the error that rounding makes."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.element import INT4
from qcompile.quant.granularity import Granularity
from qcompile.quant.reference import quantize, restore
from qcompile.quant.scale_search import (
    Reader,
    Rounding,
    best_scale,
    floored,
    normalized,
    salience_scale,
    smoothing_scale,
)
from qcompile.quant.scheme import QuantFormat

FORM = QuantFormat(INT4, Granularity(16))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return restore(quantize(weight, FORM), FORM, weight.shape[1])


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 32] and inputs [400, 32] of which two channels are fifty times the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, 32, generator=generator)
    inputs[:, [5, 20]] *= 50
    return torch.randn(24, 32, generator=generator), inputs


@pytest.mark.parametrize("input_rounding", [None, rounded])
def test_the_error_is_that_of_the_output(input_rounding: Rounding | None) -> None:
    weight, inputs = draw()
    scale = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5
    exact = inputs @ weight.T
    seen = inputs / scale if input_rounding is None else rounded(inputs / scale)
    expected = (seen @ rounded(weight * scale).T - exact).square().sum() / exact.square().sum()
    reader = Reader(weight, inputs, torch.arange(32), rounded, input_rounding)
    assert reader.error(scale) == pytest.approx(expected.item(), rel=1e-3)


def test_columns_that_read_the_same_channel_share_its_scale_and_others_have_none() -> None:
    weight, inputs = draw()
    channels = torch.arange(16).repeat_interleave(2)
    channels[-4:] = -1
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    wide = scale.repeat_interleave(2)
    wide[-4:] = 1
    assert Reader(weight, inputs, channels, rounded).error(scale) == Reader(weight, inputs, torch.arange(32), rounded).error(wide)


def test_salient_channels_are_scaled_up_and_the_error_falls() -> None:
    weight, inputs = draw()
    reader = Reader(weight, inputs, torch.arange(32), rounded)
    candidates = [salience_scale(inputs.abs().mean(0), power / 10) for power in range(1, 11)]
    best, ratio = best_scale(candidates, [reader])
    assert best is not None
    assert best[5] > 2 * best[0]
    assert ratio < 0.7
    assert ratio == pytest.approx(reader.error(best) / reader.error(torch.ones(32)))


def test_smoothing_moves_the_difficulty_from_activations_to_weights() -> None:
    weight, inputs = draw()
    reader = Reader(weight, inputs, torch.arange(32), rounded, rounded)
    scale = smoothing_scale(inputs.abs().amax(0), weight.abs().amax(0), 0.5)
    assert reader.error(scale) < 0.5 * reader.error(torch.ones(32))


def test_without_a_better_candidate_there_is_none() -> None:
    weight, inputs = draw()
    reader = Reader(weight, inputs, torch.arange(32), lambda x: x)
    assert best_scale([torch.full((32,), 2.0)], [reader]) == (None, 1.0)


def test_scales_are_finite_whatever_the_magnitudes() -> None:
    magnitude = torch.tensor([0.0, 1e-30, 1.0, 1e30])
    for scale in (salience_scale(magnitude, 1.0), smoothing_scale(magnitude, magnitude.flip(0), 0.5), normalized(floored(magnitude))):
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
    assert torch.equal(floored(torch.zeros(3)), torch.ones(3))
    assert (scale.max() * scale.min()).item() == pytest.approx(1.0, rel=1e-5)
