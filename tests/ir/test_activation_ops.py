"""Operators of quantized activations against plain formulas; sums of codes exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from qcompile.errors import FormatError
from qcompile.ir.allowed import name_of
from qcompile.quant import reference
from qcompile.quant.element import INT4, INT8, element
from qcompile.quant.format import QuantFormat
from qcompile.quant.granularity import Granularity
from qcompile.quant.hadamard import mixing_matrix

ops = torch.ops.qcompile
NAMES = (
    "quantize_activation", "quantize_activation_asym", "quantize_static", "dequantize_activation", "integer_linear",
    "float8_linear", "integer_conv2d",
    "norm_quantize", "add_norm_quantize", "gated_quantize", "hadamard_quantize",
    "norm_quantize_asym", "add_norm_quantize_asym", "gated_quantize_asym", "hadamard_quantize_asym",
)  # fmt: skip


def quantized(x: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale, and zero or None."""
    if symmetric:
        return (*ops.quantize_activation(x, bits, group_size), None)
    codes, scale, zero = ops.quantize_activation_asym(x, bits, group_size)
    return codes, scale, zero


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.integers(2, 8), group_size=st.sampled_from([-1, 8, 16, 24]),
    symmetric=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_value_is_at_most_half_a_step_away(rows: int, columns: int, bits: int, group_size: int, symmetric: bool, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scale, zero = quantized(x, bits, group_size, symmetric)
    back = ops.dequantize_activation(codes, scale, zero, group_size, torch.float32)
    size = columns if group_size == -1 else min(group_size, columns)
    step = scale.abs().repeat_interleave(size, dim=-1)[:, :columns]
    error = (back - x).abs() / step
    top = codes == (1 << (bits - 1)) - 1
    assert (error[~top] <= 0.5 + 1e-4).all()
    assert (error <= 1 + 1e-4).all()  # the greatest code may be half a step short of the end of the range
    assert codes.dtype == torch.int8
    assert scale.shape == (rows, -(-columns // size))
    assert int(codes.min()) >= -(1 << (bits - 1))
    assert int(codes.max()) < 1 << (bits - 1)


def test_the_extreme_of_larger_magnitude_takes_the_lowest_code_and_zeros_stay_zeros() -> None:
    x = torch.tensor([[1.0, -0.5, 0.25], [-1.0, 0.5, 0.25], [0.0, 0.0, 0.0]])
    codes, scale = ops.quantize_activation(x, 4, -1)
    assert scale.flatten().tolist() == [-0.125, 0.125, 1.0]
    assert codes.tolist() == [[-8, 4, -2], [-8, 4, 2], [0, 0, 0]]


def test_a_clipped_range_saturates() -> None:
    x = torch.tensor([[8.0, 2.0, -2.0]])
    codes, scale = ops.quantize_activation(x, 4, -1, "int", 0.5)
    assert scale.item() == -0.5
    assert codes.tolist() == [[-8, -4, 4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_groups_are_float16_and_codes_are_made_by_them(dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale, zero = quantized(x, 4, 32, symmetric)
    assert scale.dtype == torch.float16
    assert quantized(x, 4, -1, symmetric)[1].dtype == torch.promote_types(dtype, torch.float32)
    steps = x.double().view(7, 3, 32) / scale.double().unsqueeze(-1)
    expected = steps.round() if zero is None else steps.round() + zero.unsqueeze(-1)
    # float32 may round a quotient to a tie that float64 sees beside it.
    clear = ((steps - steps.floor()) - 0.5).abs() > 1e-6
    assert torch.equal(codes.view(7, 3, 32)[clear], expected.clamp(-8, 7).to(torch.int8)[clear])


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_groups_stay_within_float16(symmetric: bool) -> None:
    x = torch.tensor([[1e30] * 4 + [-1e30] * 4 + [1e-30] * 4 + [0.0] * 4 + [6e-7] * 4])
    codes, scale, zero = quantized(x, 4, 4, symmetric)
    large, small = 65504.0, 2.0**-24
    if symmetric:
        assert scale.tolist() == [[-large, large, -small, 1.0, -small]]
        assert codes[0, ::4].tolist() == [-8, -8, 0, 0, -8]
    else:
        assert scale.tolist() == [[large, large, small, 1.0, small]]
        assert codes[0, ::4].tolist() == [7, -8, -8, -8, 2]
    back = ops.dequantize_activation(codes, scale, zero, 4, torch.float32)
    assert back.isfinite().all()
    assert ((back - x).abs()[0, 8:] <= 3 * small).all()


def test_a_zero_point_uses_the_whole_of_a_one_sided_range() -> None:
    codes, scale, zero = ops.quantize_activation_asym(torch.tensor([[0.0, 7.5, 15.0]]), 4, -1)
    assert (scale.item(), zero.item(), codes.tolist()) == (1.0, -8, [[-8, 0, 7]])


def test_static_codes_saturate_and_share_one_scale() -> None:
    codes = ops.quantize_static(torch.tensor([[1.0, 40.0], [-3.0, -40.0]]), torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32), 4)
    assert codes.tolist() == [[3, 7], [-5, -8]]
    back = ops.dequantize_activation(codes, torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32), -1, torch.float32)
    assert back.tolist() == [[1.0, 3.0], [-3.0, -4.5]]


def test_float8_codes_keep_three_bits_of_mantissa() -> None:
    x = torch.randn(3, 50)
    codes, scale = ops.quantize_activation(x, 8, 16, "fp8")
    assert codes.dtype == torch.float8_e4m3fn
    back = ops.dequantize_activation(codes, scale, None, 16, torch.float32)
    smallest = scale.repeat_interleave(16, dim=-1)[:, :50] * 2**-9
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, smallest)).all()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 6), columns=st.integers(2, 200), rows=st.integers(1, 9), bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.sampled_from([(-1, -1), (-1, 16), (16, -1), (16, 48), (32, 16), (16, 16)]),
    symmetric=st.booleans(), kind=st.sampled_from(["sym", "asym", "min"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_integer_linear_is_the_matmul_of_what_its_codes_stand_for(
    tokens: int, columns: int, rows: int, bits: int, groups: tuple[int, int], symmetric: bool, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, columns, generator=generator)
    form = QuantFormat(element(f"int{bits}"), Granularity(groups[1]), symmetric=kind == "sym", minimum=kind == "min")
    packed = reference.quantize(torch.randn(rows, columns, generator=generator), form)
    bias = torch.randn(rows, generator=generator)
    codes, scale, zero = quantized(x, 8, groups[0], symmetric)
    got = ops.integer_linear(
        codes, scale, zero, packed.codes, packed.scale, packed.zero, bias, groups[0], bits, groups[1], torch.float64
    )  # fmt: skip
    weight = reference.dequantize(packed.codes, packed.scale, packed.zero, bits, groups[1], columns, torch.float64)
    expected = functional.linear(ops.dequantize_activation(codes, scale, zero, groups[0], torch.float64), weight, bias.double())
    # Scales are float32, one product and one sum per group.
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("columns", [64, 1032, 4096])
def test_sums_of_codes_are_those_of_int32_to_the_last_bit(columns: int) -> None:
    """The largest sums there are: every code -128, one scale of 1."""
    codes = torch.full((3, columns), -128, dtype=torch.int8)
    codes[:, 1] = 127
    scale, weight = torch.ones(3, 1, dtype=torch.float64), torch.zeros(2, columns, dtype=torch.uint8)
    weight[1, 0] = 255
    got = ops.integer_linear(codes, scale, None, weight, torch.ones(2, 1), None, None, -1, 8, -1, torch.float64)
    signed = weight.to(torch.int32) - 128
    expected = (codes.to(torch.int32).unsqueeze(1) * signed.unsqueeze(0)).sum(-1, dtype=torch.int32)
    assert torch.equal(got, expected.double())


def test_float8_sums_are_exact_too() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(4, 4096, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight = (torch.randn(8, 4096, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    got = ops.float8_linear(codes, torch.ones(4, 1, dtype=torch.float64), weight, torch.ones(8, 1), None, -1, -1, torch.float64)
    units = ((codes.double() * 512).long().unsqueeze(1) * (weight.double() * 512).long().unsqueeze(0)).sum(-1)
    assert torch.equal(got, units.double() / 512**2)


def test_a_convolution_of_codes_is_exact_to_the_last_bit() -> None:
    """Depthwise with few terms is summed in float32, dense with many in float64: both are integers."""
    generator = torch.Generator().manual_seed(0)
    for channels, groups in ((8, 8), (256, 1)):
        codes = torch.randint(-128, 128, (2, channels, 6, 6), dtype=torch.int8, generator=generator)
        weight = torch.randint(0, 256, (8, channels // groups * 9), dtype=torch.uint8, generator=generator)
        zero = torch.tensor([5], dtype=torch.int32)
        scale, ones = torch.ones(1, dtype=torch.float64), torch.ones(8, 1)
        got = ops.integer_conv2d(codes, scale, zero, weight, ones, None, [3, 3], [2, 1], [1, 1], [1, 1], groups, 8, torch.float64)
        signed = (weight.long() - 128).view(8, -1, 3, 3)
        expected = torch.conv2d(codes.long() - 5, signed, None, [2, 1], [1, 1], [1, 1], groups)
        assert torch.equal(got, expected.double())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", [QuantFormat(INT8), QuantFormat(INT4, Granularity(32), symmetric=False)])
def test_a_row_does_not_depend_on_its_batch(form: QuantFormat, symmetric: bool) -> None:
    packed = reference.quantize(torch.randn(24, 96), form)
    size = form.granularity.group_size

    def apply(x: Tensor) -> Tensor:
        codes, scale, zero = quantized(x, 8, 32, symmetric)
        parts = (packed.codes, packed.scale, packed.zero)
        result: Tensor = ops.integer_linear(codes, scale, zero, *parts, None, 32, form.element.bits, size, torch.float32)
        return result

    x = torch.randn(17, 96)
    together = apply(x)
    assert all(torch.equal(together[row : row + 1], apply(x[row : row + 1])) for row in range(17))


def test_groups_that_do_not_nest_are_refused() -> None:
    codes, scale = ops.quantize_activation(torch.randn(2, 96), 8, 32)
    packed = reference.quantize(torch.randn(4, 96), QuantFormat(INT8, Granularity(48)))
    with pytest.raises(FormatError, match="groups of 32 activations and 48 weights along 96 columns: expected one to divide the other"):
        ops.integer_linear(codes, scale, None, packed.codes, packed.scale, None, None, 32, 8, 48, torch.float32)


@pytest.mark.parametrize("suffix", ["", "_asym"])
@pytest.mark.parametrize("size", [0, 12])
def test_fused_operators_are_their_parts_to_the_last_bit(size: int, suffix: str) -> None:
    x, residual, weight = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.randn(24)
    matrix = mixing_matrix(12) if size else None

    form = (4, 8, 0.9) if suffix else (4, 8, "int", 0.9)

    def expected(value: Tensor) -> tuple[Tensor, ...]:
        rotated = ops.hadamard(value, matrix, size) if size else value
        return getattr(ops, f"quantize_activation{suffix}")(rotated, *form)  # type: ignore[no-any-return]

    total, normed = ops.add_rms_norm(x, residual, weight, 1e-5, 1.0)
    calls = {
        "norm_quantize": ((x, weight, 1e-5, 1.0), expected(ops.rms_norm(x, weight, 1e-5, 1.0))),
        "add_norm_quantize": ((x, residual, weight, 1e-5, 1.0), (total, *expected(normed))),
        "gated_quantize": ((x, residual, "silu"), expected(ops.gated_activation(x, residual, "silu"))),
        "hadamard_quantize": ((x,), expected(x)),
    }
    for name, (args, wanted) in calls.items():
        got = getattr(ops, name + suffix)(*args, matrix, size, *form)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_have_the_shapes_and_dtypes_of_results(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 40).to(dtype).transpose(0, 1)
    weight = reference.quantize(torch.randn(6, 40), QuantFormat(INT4, Granularity(16)))
    calls = [
        (ops.quantize_activation, (x, 8, 16)),
        (ops.quantize_activation, (x, 8, -1, "fp8")),
        (ops.quantize_activation_asym, (x, 8, 16)),
        (ops.quantize_static, (x, torch.ones(1), None, 8)),
        (ops.add_norm_quantize, (x, x, None, 1e-5, 0.0, None, 0, 8, -1)),
        (ops.norm_quantize, (x, None, 1e-5, 0.0, None, 0, 8, -1)),
        (ops.gated_quantize, (x, x, "relu", None, 0, 8, 16)),
        (ops.hadamard_quantize, (x, None, 8, 8, 16)),
        (ops.add_norm_quantize_asym, (x, x, None, 1e-5, 0.0, None, 0, 8, -1)),
        (ops.norm_quantize_asym, (x, None, 1e-5, 0.0, None, 0, 8, -1)),
        (ops.gated_quantize_asym, (x, x, "relu", None, 0, 8, 16)),
        (ops.hadamard_quantize_asym, (x, None, 8, 8, 16)),
    ]
    codes, scale = ops.quantize_activation(x, 8, 16)
    calls.append((ops.dequantize_activation, (codes, scale, None, 16, dtype)))
    image = torch.zeros(2, 4, 5, 5, dtype=torch.int8)
    filters = reference.quantize(torch.randn(6, 36), QuantFormat(INT8))
    windows = ([3, 3], [1, 1], [0, 0], [1, 1], 1, 8)
    calls.append((ops.integer_conv2d, (image, torch.ones(1), None, filters.codes, filters.scale, torch.zeros(6), *windows, dtype)))
    calls.append((ops.integer_linear, (codes, scale, None, weight.codes, weight.scale, None, None, 16, 4, 16, dtype)))
    with FakeTensorMode() as mode:
        for operator, args in calls:
            fake = operator(*[mode.from_tensor(item) if isinstance(item, Tensor) else item for item in args])
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                real = operator(*args)
            pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
            for a, b in pairs:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), operator


def test_they_may_be_stored() -> None:
    assert [name_of(getattr(ops, name).default) for name in NAMES] == [f"qcompile.{name}.default" for name in NAMES]
