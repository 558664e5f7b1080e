"""Formats of cached vectors: the error of a number, bytes, text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import FormatError
from qcompile.quant.vector_format import vector_format

INTEGERS = [f"int{bits}{group} {kind}" for bits in (2, 3, 4, 6, 8) for group in ("", " g8") for kind in ("sym", "asym")]


@settings(max_examples=60, deadline=None)
@given(text=st.sampled_from(INTEGERS), size=st.integers(1, 33), seed=st.integers(0, 1000), spread=st.sampled_from([1e-6, 1.0, 300.0]))
def test_half_a_step_and_what_float16_adds(text: str, size: int, seed: int, spread: float) -> None:
    form = vector_format(text)
    x = spread * torch.randn(2, 3, 4, size, generator=torch.Generator().manual_seed(seed))
    packed = form.encode(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 4, form.width(size))
    groups = x.unflatten(-1, (form.groups(size), -1))
    largest = groups.abs().amax(-1, keepdim=True)
    step = (
        largest / form.element.high
        if form.symmetric
        else (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (form.element.levels - 1)
    )
    # Rounding of the least value and, up to the end of the range, of the step; float16's least normal step.
    bound = (0.5 * step + largest * 2**-10 + 7e-5).expand_as(groups).flatten(-2)
    assert ((form.decode(packed, size) - x).abs() <= bound).all()


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 5.0, 100.0, 1e4]).view(5, 1)
    form = vector_format("fp8 g32")
    error = (form.decode(form.encode(x), 64) - x).abs()
    finest = (
        x.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True).expand(5, 2, 32).flatten(1) / 448 * 2**-9
    )  # half the least subnormal, and more
    assert (error <= x.abs() * (2**-4 + 2**-11) + finest).all()


@pytest.mark.parametrize(
    ("text", "size", "bits"),
    [
        ("int4 g64 asym", 64, 4.5), ("int4 g64 asym", 128, 4.5), ("int8 g64 sym", 64, 8.25), ("fp8 g64", 128, 8.25),
        ("int3 asym", 64, 3.5), ("int4 g64", 80, 4.4), ("int4 t32", 64, 5.0), ("int2 t32", 128, 3.0),
    ],
)  # fmt: skip
def test_bits_count_scales(text: str, size: int, bits: float) -> None:
    form = vector_format(text)
    assert form.bits(size) == bits
    assert form.encode(torch.zeros(form.tokens, size)).numel() * 8 == bits * size * form.tokens


@pytest.mark.parametrize("text", ["int2 t4 asym", "int4 t8 sym", "fp8 t2 sym"])
def test_per_channel_is_per_token_of_the_transposed(text: str) -> None:
    form = vector_format(text)
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    other = vector_format(text.replace(" t", " g"))
    blocks = x.unflatten(2, (-1, form.tokens)).transpose(-1, -2)
    expected = other.decode(other.encode(blocks), form.tokens).transpose(-1, -2).flatten(2, 3)
    packed = form.encode(x)
    assert packed.shape == (2, 3, 16, form.width(8))
    assert torch.equal(form.decode(packed, 8), expected)


def test_tokens_that_do_not_share_bytes_evenly_are_filled_up() -> None:
    form, x = vector_format("int3 t16 asym"), torch.randn(1, 32, 2)
    packed = form.encode(x)
    assert packed.shape == (1, 32, 2)  # 12 bytes of codes, 8 of scales and least values, 12 that mean nothing
    assert (form.decode(packed, 2) - x).abs().max() <= (x.amax() - x.amin()) / 14 + 1e-2


@pytest.mark.parametrize("text", ["int2 asym", "int5 g4 sym", "fp8"])
def test_a_vector_of_one_value_and_one_of_zeros_are_exact(text: str) -> None:
    form = vector_format(text)
    for value in (0.25, 0.0):
        x = torch.full((1, 8), value)
        torch.testing.assert_close(form.decode(form.encode(x), 8), x, rtol=2**-11, atol=0)


@pytest.mark.parametrize("text", [*INTEGERS, "fp8 sym", "fp8 g16 sym", "int4 t32 asym"])
def test_text_round_trips(text: str) -> None:
    assert str(vector_format(text)) == text


@pytest.mark.parametrize("text", ["int9", "int4 g0", "fp8 asym", "int4 64", "nf4", ""])
def test_other_text_says_what_is_expected(text: str) -> None:
    with pytest.raises(FormatError, match="expected int2 to int8 or fp8"):
        vector_format(text)
