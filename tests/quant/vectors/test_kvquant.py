"""KVQuant: levels that follow the data beat even ones, outliers are exact, and more of them lose less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.vector_format import vector_format
from tests.quant.vectors.samples import as_rows, cached, error, tables_of, there_and_back


@pytest.mark.parametrize(
    ("text", "size", "width"),
    [("nuq3 static s1", 64, 27), ("nuq3 token s1", 64, 31), ("nuq4 static", 128, 64), ("nuq2 token s2", 8, 12), ("nuq3 static s1", 20, 11)],
)
def test_width(text: str, size: int, width: int) -> None:
    assert vector_format(text).width(size) == width


def skewed(seed: int, size: int = 32) -> torch.Tensor:
    """Heavy tails on one side."""
    return torch.randn(400, 2, size, generator=torch.Generator().manual_seed(seed)).exp()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 4))
def test_levels_beat_even_ones_on_skewed_data(seed: int, bits: int) -> None:
    x = skewed(seed)
    assert error(f"nuq{bits} token", x) < 0.9 * error(f"int{bits} asym", x)


@pytest.mark.parametrize("kind", ["static", "token"])
def test_levels_serve_data_they_were_not_made_from(kind: str) -> None:
    calibration, x = cached(800).split(400)
    assert error(f"nuq3 {kind} s1", x, calibration) < 1.1 * error(f"nuq3 {kind} s1", x)


def test_calibrated_channels_beat_tokens_where_channels_differ() -> None:
    x = cached(mixed=False)
    assert error("nuq3 static", x) < 0.9 * error("nuq3 token", x)


@pytest.mark.parametrize("kind", ["static", "token"])
def test_more_outliers_lose_less(kind: str) -> None:
    x = skewed(0)
    errors = [error(f"nuq3 {kind}{text}", x) for text in ("", " s1", " s2", " s4", " s8")]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["static", "token"])
def test_outliers_are_exact_to_float16(kind: str) -> None:
    calibration, x = cached(600).split(300)
    x = x.clone()
    x[torch.arange(300), 0, torch.arange(300) % 32] = 70 + torch.rand(300)
    x[torch.arange(300), 1, torch.arange(300) % 5] = -500 - torch.rand(300)
    found, rows = there_and_back(f"nuq3 {kind} s1", x, calibration), as_rows(x)
    assert torch.equal(found[rows.abs() > 60], rows[rows.abs() > 60].half().float())
    # The others are as if it had not been there.
    calm = rows.abs() <= 60
    plain = (there_and_back(f"nuq3 {kind} s1", calibration) - as_rows(calibration)).square().mean()
    assert (found - rows)[calm].square().mean() < 1.5 * plain


def test_numbers_are_at_the_nearest_level() -> None:
    x = cached(100)
    form = vector_format("nuq3 static")
    levels, scale, centre = (table.float() for table in tables_of(form, x))
    assert levels.shape == (1, 8)
    assert (levels.diff() > 0).all()
    every = centre.unsqueeze(-1) + scale.unsqueeze(-1) * levels[0]  # [L, D, 8]
    expected = (x.unsqueeze(-1) - every).abs().amin(-1)
    torch.testing.assert_close((there_and_back(form, x) - as_rows(x)).abs(), as_rows(expected), rtol=1e-4, atol=1e-6)


def test_what_counts_more_is_closer_to_the_levels() -> None:
    x = torch.cat((torch.randn(2000, 1, 8), torch.rand(2000, 1, 8) * 4), dim=-1)
    form = vector_format("nuq3 static")
    importance = torch.ones(1, 16)
    importance[:, 8:] = 100

    def of_the_heavy(weights: torch.Tensor) -> float:
        tables = form.calibrate(x, weights)
        lost = form.decode(form.encode(as_rows(x), tables), 16, tables=tables) - as_rows(x)
        return float(lost[..., 8:].square().mean())

    assert of_the_heavy(importance) < 0.9 * of_the_heavy(torch.ones(1, 16))
