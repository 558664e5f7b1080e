"""GEAR: outliers and then directions lower the error, each by what it holds; groups are independent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.vector_format import vector_format
from tests.quant.vectors.samples import as_rows, cached, error, there_and_back


@pytest.mark.parametrize(
    ("text", "size", "width"),
    [
        ("gear64 r2 s1 int2 t64 asym", 64, 16 + 4 + 3 + 4 + 4),
        ("gear64 r2 s1 int2 g64 asym", 64, 16 + 4 + 3 + 4 + 4),
        ("gear32 r2 s1 int4 t32 asym", 128, 64 + 16 + 3 + 4 + 16),
        ("gear64 r1 int4 sym", 8, 4 + 2 + 2 + 1),
        ("gear8 s2 int4 sym", 8, 4 + 2 + 6),
    ],
)
def test_width(text: str, size: int, width: int) -> None:
    assert vector_format(text).width(size) == width


def heavy(seed: int) -> torch.Tensor:
    """Vectors of which some numbers are far from the others."""
    x = cached(64, 2, 32, seed)
    far = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.02
    return torch.where(far, 8 * x, x)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), inner=st.sampled_from(["int2 t32 asym", "int2 g32 asym", "int4 t32 asym", "int4 g16 asym", "int3 sym"]))
def test_outliers_and_then_directions_lower_the_error(seed: int, inner: str) -> None:
    x = heavy(seed)
    plain, sparse, both = (error(f"gear32{text} {inner}", x) for text in ("", " s1", " r2 s1"))
    assert plain == error(inner, x)
    assert both < sparse < plain


def test_each_direction_and_each_outlier_lowers_the_error() -> None:
    x = heavy(0)
    for errors in (
        [error(f"gear32 r{rank} s1 int2 t32 asym", x) for rank in (1, 2, 4, 8, 16, 32)],
        [error(f"gear32 r1 s{outliers} int2 g32 asym", x) for outliers in (1, 2, 4, 8)],
    ):
        assert errors == sorted(errors, reverse=True)
    assert error("gear32 r32 s1 int2 t32 asym", x) < 2e-3 * float(x.square().mean().sqrt())


def test_directions_are_the_best_of_their_rank() -> None:
    x = heavy(1)[:32, :1]
    lost = as_rows(x) - there_and_back("gear32 int2 t32 asym", x)
    spectrum = torch.linalg.svdvals(lost[0, 0]).square()
    found = (as_rows(x) - there_and_back("gear32 r3 int2 t32 asym", x)).square().sum()
    torch.testing.assert_close(found, spectrum[3:].sum(), rtol=1e-3, atol=0)


def test_outliers_are_exact_to_float16() -> None:
    x = cached(64, 2, 32)
    x[torch.arange(64), 0, torch.arange(64) % 32] = 300 + torch.rand(64)
    x[torch.arange(64), 1, torch.arange(64) % 7] = -900 - torch.rand(64)
    found, rows = there_and_back("gear32 r2 s1 int2 t32 asym", x), as_rows(x)
    assert torch.equal(found[rows.abs() > 200], rows[rows.abs() > 200].half().float())
    assert (found - rows).abs()[rows.abs() <= 200].max() < 3


def test_a_group_is_stored_by_itself() -> None:
    x = heavy(2)
    form = vector_format("gear32 r2 s1 int2 t32 asym")
    packed = form.encode(as_rows(x))
    other = as_rows(x).clone()
    other[:, :, 32:] += 1
    assert torch.equal(form.encode(other)[:, :, :32], packed[:, :, :32])
    assert not torch.equal(form.encode(other)[:, :, 32:], packed[:, :, 32:])
