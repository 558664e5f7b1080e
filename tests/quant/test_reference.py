"""Quantize, pack and dequantize: invariants over shapes and formats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import FormatError, WeightError
from qcompile.quant.element import ELEMENTS
from qcompile.quant.granularity import Granularity
from qcompile.quant.reference import dequantize, pack, per_column, quantize, stored_bits, unpack
from qcompile.quant.scheme import QuantFormat

FORMATS = st.builds(
    QuantFormat,
    element=st.sampled_from([ELEMENTS[f"int{bits}"] for bits in range(2, 9)]),
    granularity=st.sampled_from([Granularity(-1), Granularity(16), Granularity(32), Granularity(64)]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)


def restored(weight: torch.Tensor, form: QuantFormat) -> torch.Tensor:
    q = quantize(weight, form)
    return dequantize(q.codes, q.scale, q.zero, form.element.bits, form.granularity.group_size, weight.shape[1], torch.float64)


@settings(max_examples=60, deadline=None)
@given(form=FORMATS, rows=st.integers(1, 5), columns=st.integers(2, 150), seed=st.integers(0, 1000))
def test_error_is_at_most_half_a_step_inside_the_range(form: QuantFormat, rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    q = quantize(weight, form)
    size = form.granularity.size(columns)
    step = per_column(q.scale.double().abs(), size, columns)
    value = restored(weight, form)
    # At the far end a symmetric code is one short (the extreme keeps its sign), an asymmetric one is off by the rounded zero point;
    # a scale rounded to its storage type moves the ends by another levels/2 units in its last place.
    rounding = form.element.levels * torch.finfo(form.scale_dtype).eps
    ends = 1.0 + rounding
    assert bool(((value - weight.double()).abs() <= step * ends + 1e-12).all())
    inside = (value / step).abs() < form.element.high - 1
    if form.symmetric:
        assert bool(((value - weight.double()).abs() <= step * (0.5 + 1e-6))[inside].all())


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 33), seed=st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_low_nibble_comes_first() -> None:
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_a_grid_of_sixteen_levels_is_lossless_in_asymmetric_int4() -> None:
    weight = torch.arange(-5, 11).float().repeat(3, 4)
    form = QuantFormat(ELEMENTS["int4"], Granularity(16), symmetric=False)
    assert torch.equal(restored(weight, form).float(), weight)


def test_the_extreme_of_larger_magnitude_is_exact_whatever_its_sign() -> None:
    weight = torch.tensor([[0.5, -0.25, 2.0, -1.0], [0.5, -0.25, 1.0, -2.0]])
    form = QuantFormat(ELEMENTS["int4"])
    assert restored(weight, form)[0, 2] == 2.0
    assert restored(weight, form)[1, 3] == -2.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_channel_of_zeros_stays_exactly_zero(symmetric: bool) -> None:
    weight = torch.zeros(2, 64)
    weight[1] = torch.randn(64)
    assert torch.equal(restored(weight, QuantFormat(ELEMENTS["int4"], Granularity(32), symmetric))[0], torch.zeros(64, dtype=torch.float64))


def test_tiny_weights_keep_their_sign_and_do_not_divide_by_zero() -> None:
    weight = torch.full((1, 32), -1e-12)
    value = restored(weight, QuantFormat(ELEMENTS["int4"], Granularity(32)))
    assert bool(torch.isfinite(value).all())
    assert value.abs().max() <= torch.finfo(torch.float16).tiny


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_place(bad: float) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 5] = bad
    with pytest.raises(WeightError, match=r"q_proj\[1, 5\] is (nan|inf): expected finite weights"):
        quantize(weight, QuantFormat(ELEMENTS["int8"]), "q_proj")


def test_a_scale_beyond_its_storage_type_is_refused() -> None:
    with pytest.raises(WeightError, match=r"does not fit torch\.float16; choose scale_dtype=float32"):
        quantize(torch.full((1, 8), 1e9), QuantFormat(ELEMENTS["int4"]))


def test_only_matrices_are_quantized() -> None:
    with pytest.raises(FormatError, match=r"expected a matrix \[N, K\], got shape \(2, 2, 2\)"):
        quantize(torch.zeros(2, 2, 2), QuantFormat(ELEMENTS["int4"]))


def test_stored_bits_count_scales_and_zero_points() -> None:
    symmetric = QuantFormat(ELEMENTS["int4"], Granularity(64))
    assert stored_bits(symmetric, 10, 640) == 10 * (640 * 4 + 10 * 16)
    asymmetric = QuantFormat(ELEMENTS["int4"], Granularity(64), symmetric=False)
    assert stored_bits(asymmetric, 10, 640) == 10 * (640 * 4 + 10 * 16 + 10 * 4)
