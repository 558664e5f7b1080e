"""GPTQ for many small matrices at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.errors import WeightError
from qcompile.quant.format import parse_format
from qcompile.quant.reference import quantize, restore
from qcompile.quant.rounding.grouped_gptq import grouped_gptq

FORMS = ("int8 channel sym fp16", "int8 channel asym fp16", "int4 g4 sym int8", "fp8 channel sym fp32", "int4 channel min fp16")


def _problem() -> tuple[Tensor, Tensor]:
    """Filters [12, 9] in 6 groups of two, and what smooth inputs far from zero give; the last group never saw anything."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 + torch.randn(6, 200, 9, generator=generator).cumsum(2)
    moments = rows.transpose(1, 2) @ rows / 200
    moments[-1] = 0
    return torch.randn(12, 9, generator=generator), moments


def _errors(weight: Tensor, rounded: Tensor, moments: Tensor) -> Tensor:
    error = (weight - rounded).view(len(moments), -1, weight.shape[1])
    return ((error @ moments) * error).sum(-1).flatten()


@pytest.mark.parametrize("text", FORMS)
def test_no_row_is_worse_than_nearest_and_most_are_better(text: str) -> None:
    weight, moments = _problem()
    form = parse_format(text)
    found = _errors(weight, restore(grouped_gptq(weight, moments, form), form, 9), moments)
    nearest = _errors(weight, restore(quantize(weight, form), form, 9), moments)
    assert bool((found <= nearest * (1 + 1e-4)).all())
    assert float(found.sum()) < 0.5 * float(nearest.sum())


def test_zeros_stay_zeros() -> None:
    form = parse_format(FORMS[0])
    rounded = restore(grouped_gptq(torch.zeros(4, 9), torch.zeros(4, 9, 9), form), form, 9)
    assert not bool(rounded.any())


def test_moments_that_fit_no_groups_are_refused() -> None:
    weight, moments = _problem()
    with pytest.raises(
        WeightError, match=r"filters: expected second moments \[groups, 9, 9\] of groups that divide 12 rows, got \(5, 9, 9\)"
    ):
        grouped_gptq(weight, moments[:5], parse_format(FORMS[0]), name="filters")
    moments[0, 0, 0] = torch.nan
    with pytest.raises(WeightError, match="expected finite second moments, got NaN or infinity"):
        grouped_gptq(weight, moments, parse_format(FORMS[0]))
