"""GPTQ and the search for scales: what must hold for any weight, second moment and format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import FormatError, WeightError
from qcompile.quant.format import parse_format
from qcompile.quant.reference import nearest_grid, quantize, restore, snap_to_grid
from qcompile.quant.rounding.gptq import column_order, fit_scales, gptq, inverse_factor, row_errors
from qcompile.quant.rounding.mse_clip import mse_clip

FORMATS = (
    "int4 g16 sym fp16", "int3 g20 asym fp16", "int2 g16 asym fp16", "int4 g16 sym int8", "int4 g16 asym int8/2", "int8 channel sym fp32",
    "nf4 g16 sym fp16", "fp4 g32 sym e8m0", "int8 g32 sym e8m0", "fp4 g16 sym e4m3", "fp8 channel sym bf16", "int4 g16 min fp16",
    "int2 g20 min fp32",
)  # fmt: skip


def layer(rows: int, columns: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of correlated inputs to it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(2.0, 0.1, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return weight, inputs.T @ inputs / tokens


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(FORMATS), rows=st.integers(1, 6), columns=st.integers(2, 70), tokens=st.integers(1, 80), seed=st.integers(0, 99)
)
def test_no_row_is_worse_than_rounded_to_nearest(text: str, rows: int, columns: int, tokens: int, seed: int) -> None:
    form = parse_format(text)
    weight, moment = layer(rows, columns, seed, tokens)
    found = row_errors(weight, moment, restore(gptq(weight, moment, form), form, columns))
    nearest = row_errors(weight, moment, restore(quantize(weight, form), form, columns))
    assert bool((found <= nearest * (1 + 1e-4) + 1e-5 * float(moment.diagonal().mean())).all())


@settings(max_examples=40, deadline=None)
@given(text=st.sampled_from(FORMATS), rows=st.integers(1, 6), columns=st.integers(2, 70), seed=st.integers(0, 99), weighted=st.booleans())
def test_searched_scales_are_no_worse_than_the_widest(text: str, rows: int, columns: int, seed: int, weighted: bool) -> None:
    form = parse_format(text)
    weight, moment = layer(rows, columns, seed)
    importance = moment.diagonal() if weighted else torch.ones(columns)
    size = form.granularity.size(columns)

    def errors(restored: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in ((restored - weight).square() * importance).split(size, dim=1)])

    found = errors(restore(mse_clip(weight, form, importance if weighted else None), form, columns))
    assert bool((found <= errors(restore(quantize(weight, form), form, columns)) * (1 + 1e-5) + 1e-6).all())


@pytest.mark.parametrize(("text", "most"), [
    ("int4 g64 sym fp16", 0.55), ("int3 g64 sym fp16", 0.55), ("int2 g64 asym fp16", 0.45), ("int4 g32 min fp16", 0.55),
    ("nf4 g64 sym fp16", 0.55),
    ("fp4 g16 sym e4m3", 0.6),
])  # fmt: skip
def test_it_saves_about_half_of_the_error(text: str, most: float) -> None:
    form = parse_format(text)
    weight, moment = layer(64, 256, 0)
    found, nearest = gptq(weight, moment, form), quantize(weight, form)
    ratio = row_errors(weight, moment, restore(found, form, 256)).sum() / row_errors(weight, moment, restore(nearest, form, 256)).sum()
    assert ratio < most


def test_the_search_clips_and_turns_ranges_over() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    form = parse_format("int3 g64 sym fp16")
    before, after = ((restore(packed, form, 256) - weight).square().mean() for packed in (quantize(weight, form), mse_clip(weight, form)))
    assert after < 0.9 * before
    signs = mse_clip(weight, form).scale.sign() * quantize(weight, form).scale.sign()
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}


def test_importance_moves_the_error_to_where_it_costs_nothing() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[:, ::8] *= 3
    form = parse_format("int3 g64 sym fp16")
    importance = torch.ones(64)
    importance[::8] = 0.0
    plain, weighted = (restore(mse_clip(weight, form, each), form, 64) for each in (None, importance))
    cost = [(((restored - weight) ** 2) * importance).sum() for restored in (plain, weighted)]
    assert cost[1] < 0.5 * cost[0]


def test_the_order_of_rows_does_not_matter() -> None:
    weight, moment = layer(12, 48, 1)
    form = parse_format("int4 g16 sym fp16")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    whole, shuffled = gptq(weight, moment, form), gptq(weight[order], moment, form)
    assert torch.equal(shuffled.codes, whole.codes[order])
    assert torch.equal(shuffled.scale, whole.scale[order])


def test_the_order_of_columns_does_not_matter_where_one_scale_serves_all() -> None:
    weight, moment = layer(8, 32, 3)
    form = parse_format("int4 channel sym fp32")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    whole = restore(gptq(weight, moment, form), form, 32)
    shuffled = restore(gptq(weight[:, order], moment[order][:, order], form), form, 32)
    torch.testing.assert_close(shuffled, whole[:, order], rtol=1e-4, atol=1e-5)


def test_columns_go_by_importance_within_groups_and_groups_too() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 0.5, 7.0])
    assert column_order(diagonal, 3).tolist() == [3, 4, 5, 1, 2, 0, 6]


def test_columns_that_were_never_active_are_rounded_to_nearest() -> None:
    weight, moment = layer(8, 32, 5)
    dead = torch.tensor([3, 17, 30])
    moment[dead] = 0
    moment[:, dead] = 0
    form = parse_format("int4 channel sym fp32")
    packed = gptq(weight, moment, form)
    steps = packed.scale.abs()
    error = (restore(packed, form, 32) - weight)[:, dead].abs()
    inside = weight[:, dead].abs() < 6 * steps
    assert bool((error <= steps * 0.5001)[inside].all())
    assert int(inside.sum()) > 12


@pytest.mark.parametrize("moment", [torch.zeros(16, 16), torch.ones(16, 16), torch.full((16, 16), 1e-30), torch.eye(16) * 1e30])
def test_singular_tiny_and_huge_second_moments_are_damped(moment: Tensor) -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(6))
    form = parse_format("int8 channel sym fp16")
    restored = restore(gptq(weight, moment, form), form, 16)
    assert (restored - weight).abs().max() < 0.2


def test_a_second_moment_that_is_slightly_indefinite_is_damped_further() -> None:
    moment = torch.eye(8)
    moment[0, 0] = -0.05
    factor = inverse_factor(moment, 0.01, "w").double()
    damped = torch.linalg.inv(factor.T @ factor)
    extra = damped.diagonal()[1] - 1.0
    torch.testing.assert_close(damped, moment.double() + extra * torch.eye(8), rtol=1e-5, atol=1e-5)
    assert 0.05 < extra < 1.0


def test_the_factor_is_that_of_the_inverse() -> None:
    _, moment = layer(1, 40, 7)
    factor = inverse_factor(moment, 0.01, "w").double()
    assert torch.equal(factor, factor.triu())
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["int4 g16 sym fp16", "int4 g16 asym fp16", "int4 g16 min fp16", "nf4 g16 sym fp16", "fp4 g16 sym e4m3"])
def test_weights_that_the_format_holds_stay_as_they_are(text: str) -> None:
    form = parse_format(text)
    weight, moment = layer(8, 48, 8)
    weight = restore(quantize(weight, form), form, 48)
    weight = restore(quantize(weight, form), form, 48)  # the second time, every group spans its whole range
    torch.testing.assert_close(restore(quantize(weight, form), form, 48), weight, rtol=2e-3, atol=0)
    torch.testing.assert_close(restore(gptq(weight, moment, form), form, 48), weight, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(restore(mse_clip(weight, form), form, 48), weight, rtol=2e-3, atol=1e-3)


def test_fitting_scales_to_the_levels_never_loses() -> None:
    weight, moment = layer(16, 96, 9)
    for text in ("int4 g32 sym fp16", "int2 g32 asym fp16", "int3 g32 min fp16", "int4 g32 sym int8", "fp4 g16 sym e4m3"):
        form = parse_format(text)
        grid = nearest_grid(weight, form, "w")
        levels = snap_to_grid(weight, grid)
        fitted, pull = fit_scales(weight, moment, grid, levels, "w")
        before, after = (row_errors(weight, moment, restore(each.assemble(levels), form, 96)) for each in (grid, fitted))
        torch.testing.assert_close(pull, (weight - restore(fitted.assemble(levels), form, 96)) @ moment, rtol=1e-3, atol=1e-3)
        assert bool((after <= before * (1 + 1e-4)).all())
        assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize(("moment", "message"), [
    (torch.eye(7), r"down_proj: expected a second moment of shape \(8, 8\), got \(7, 7\); calibrate again"),
    (torch.full((8, 8), torch.nan), "down_proj: expected a finite second moment, got NaN or infinity"),
    (-torch.eye(8), "down_proj: expected a positive semidefinite second moment"),
])  # fmt: skip
def test_a_bad_second_moment_is_refused_by_name(moment: Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=message):
        gptq(torch.ones(4, 8), moment, parse_format("int4 g4 sym fp16"), name="down_proj")


@pytest.mark.parametrize(
    "method", [lambda weight, form: mse_clip(weight, form, name="w"), lambda weight, form: gptq(weight, torch.eye(4), form, name="w")]
)
def test_bad_weights_are_refused_by_name(method: object) -> None:
    assert callable(method)
    form = parse_format("int4 g4 sym fp16")
    with pytest.raises(WeightError, match=r"w\[1, 2\] is nan: expected finite weights"):
        method(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, torch.nan, 4.0]]), form)
    with pytest.raises(FormatError, match=r"w: expected a matrix \[N, K\]"):
        method(torch.zeros(2, 2, 4), form)
    with pytest.raises(WeightError, match=r"w: a scale of .* does not fit"):
        method(torch.full((2, 4), 1e7), form)


@pytest.mark.parametrize("text", ["int4 g16 sym fp16", "int2 g16 asym fp16", "int2 g16 min fp16"])
def test_what_is_left_beside_the_levels_is_what_earlier_columns_made_of_the_weight(text: str) -> None:
    """Without correlations nothing is made up for, and it is the weight's own, but for the last fit of the scales."""
    form = parse_format(text)
    weight, moment = layer(6, 48, 1)
    likeness = []
    for second in (torch.diag(moment.diagonal()), moment):
        rounded = gptq(weight, second, form)
        assert rounded.residual is not None
        assert rounded.residual.dtype == torch.int8
        own = (weight - restore(rounded, form, 48)) / rounded.scale.float().repeat_interleave(16, dim=1)
        inside = own.abs() < 0.5
        likeness.append(float(torch.corrcoef(torch.stack([rounded.residual.float()[inside], own[inside]]))[0, 1]))
    assert likeness[0] > 0.95 > 0.8 > likeness[1], likeness
