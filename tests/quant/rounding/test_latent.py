"""Weights whose rounding is learned: they start where another method ended and stay in the format."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.reference import quantize, restore
from qcompile.quant.rounding.gptq import gptq
from qcompile.quant.rounding.latent import LatentWeight

FORMS = [
    "int4 g16 sym fp16",
    "int2 g16 asym fp16",
    "int4 g16 min fp16",
    "int3 g48 sym bf16",
    "int4 g16 sym int8",
    "nf4 g16 sym fp16",
    "fp4 g32 sym e8m0",
]


def started(form: QuantFormat) -> tuple[Tensor, LatentWeight, Tensor]:
    """A weight [8, 80], its latent form, and what it was rounded to."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 80), torch.randn(200, 80) @ torch.randn(80, 80)
    rounded = gptq(weight, inputs.t() @ inputs / 200, form)
    return weight, LatentWeight(weight, rounded, form), restore(rounded, form, 80)


@pytest.mark.parametrize("text", FORMS)
def test_a_latent_weight_starts_where_the_rounding_ended(text: str) -> None:
    form = parse_format(text)
    _, latent, rounded = started(form)
    torch.testing.assert_close(latent.weight(), rounded, rtol=0, atol=1e-6)
    torch.testing.assert_close(restore(latent.rounded(), form, 80), rounded, rtol=0, atol=0)


@pytest.mark.parametrize("text", FORMS)
def test_what_is_packed_is_what_was_learned(text: str) -> None:
    form = parse_format(text)
    _, latent, rounded = started(form)
    latent.latent += torch.randn_like(latent.latent) * latent.spacing
    latent.confine()
    if latent.adapts_scale:
        latent.stretch += 0.1
    found = restore(latent.rounded(), form, 80)
    assert (found - rounded).abs().max() > 0.1
    packed = latent.rounded()
    # Scales are stored in bfloat16 at worst; the distance from a minimum is what they make, and it may lie beside 0.
    atol = 15 * 2**-11 * float(packed.scale.float().max()) if form.minimum else 0
    torch.testing.assert_close(found, latent.weight(), rtol=2**-8, atol=atol)


def test_the_gradient_of_a_scale_is_that_of_the_weight_along_it() -> None:
    _, latent, _ = started(parse_format("int4 g16 sym fp16"))
    slope, before = torch.randn(8, 80), latent.weight()
    expected = latent.gradients(slope)[1]
    latent.stretch[2, 3] += 1e-3
    changed = ((latent.weight() - before) * slope).sum() / 1e-3
    torch.testing.assert_close(changed, expected[2, 3], rtol=2e-3, atol=1e-4)  # of second order in the step


def test_the_gradient_passes_the_rounding_in_steps_of_the_group() -> None:
    _, latent, _ = started(parse_format("int4 g16 sym fp16"))
    slope, before = torch.randn(8, 80), latent.weight()
    expected = latent.gradients(slope)[0]
    upward = torch.where(latent.latent > 0, -1.0, 1.0)  # a whole step, towards the middle of the range
    latent.latent += upward
    torch.testing.assert_close((latent.weight() - before) * slope, expected * upward, rtol=1e-4, atol=1e-5)


def test_values_do_not_leave_the_range() -> None:
    form = parse_format("int2 g16 asym fp16")
    _, latent, _ = started(form)
    latent.latent += 100
    latent.confine()
    top = latent.weight()
    latent.latent -= 1.0
    assert bool((latent.weight() != top).all())  # one step back is in reach


def test_scales_under_a_second_level_stay() -> None:
    assert not started(parse_format("int4 g16 sym int8"))[1].adapts_scale
    assert not started(parse_format("fp4 g32 sym e8m0"))[1].adapts_scale
    assert started(parse_format("int4 g16 sym fp16"))[1].adapts_scale


def test_a_weight_rounded_to_nearest_keeps_its_own_values() -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(4, 32), parse_format("int8 g32 sym fp32")
    rounded = quantize(weight, form)
    torch.testing.assert_close(LatentWeight(weight, rounded, form).latent * rounded.scale, weight, rtol=0, atol=1e-3)


def test_values_start_where_they_lay_when_they_were_rounded() -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(4, 32), parse_format("int4 g32 sym fp16")
    rounded = quantize(weight, form)
    residual = torch.randint(-126, 127, (4, 32), dtype=torch.int8)
    own, given = LatentWeight(weight, rounded, form), LatentWeight(weight, replace(rounded, residual=residual), form)
    torch.testing.assert_close(given.latent - own.latent.round(), residual.float() / 256, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.weight(), own.weight())
