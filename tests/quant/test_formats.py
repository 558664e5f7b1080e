"""Element types, scale types and bit packing: every format round-trips its own levels, and says what it stores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import ArtifactError, FormatError, WeightError
from qcompile.ir.constants import rounded_constants, tensor_constant
from qcompile.ir.serialize import format_of
from qcompile.quant.element import ELEMENTS, FP4, FP8, NF4, element_of
from qcompile.quant.format import MXFP4, MXINT8, NVFP4, QuantFormat, parse_format
from qcompile.quant.granularity import Granularity
from qcompile.quant.levels import decode, encode, snap
from qcompile.quant.packing import pack, packed_bytes, unpack
from qcompile.quant.reference import Quantized, quantize, restore, stored_bits
from qcompile.quant.scales import effective, second_level, store

FORMATS = (
    *(f"int{bits} g16 {kind} fp16" for bits in range(2, 9) for kind in ("sym", "asym", "min")),
    "int4 g20 min bf16", "int5 channel min fp32", "int4 g20 sym int8", "int4 g16 asym int8/2", "int3 channel sym bf16", "int4 g32 sym e4m3",
    "nf4 g64 sym fp16", "nf4 g16 sym int8", "fp4 g32 sym fp16", "fp8 channel sym fp32", "fp4 g32 sym e8m0", "fp8 g32 sym e8m0",
    "int8 g32 sym e8m0", "fp4 g16 sym e4m3",
)  # fmt: skip


@pytest.mark.parametrize("text", FORMATS)
def test_a_format_prints_as_it_is_read(text: str) -> None:
    assert str(parse_format(text)) == text
    assert format_of(text) == parse_format(text)


def test_presets_are_the_formats_of_their_standards() -> None:
    assert [str(form) for form in (MXFP4, MXINT8, NVFP4)] == ["fp4 g32 sym e8m0", "int8 g32 sym e8m0", "fp4 g16 sym e4m3"]


@pytest.mark.parametrize(("text", "message"), [
    ("fp4 g32 sym e4m3", "group_size=32: NVFP4 wants groups of 16"),
    ("fp4 g16 sym e8m0", "group_size=16: MX wants groups of 32"),
    ("int4 g32 sym e8m0", r"int4: MX scales \(e8m0\) want fp4, fp8 or symmetric int8"),
    ("int8 g32 asym e8m0", r"int8: MX scales \(e8m0\) want fp4, fp8 or symmetric int8"),
    ("nf4 g64 asym fp16", "nf4: expected symmetric=True, a table of numbers has no zero point"),
    ("int4 g64 sym fp16/8", "super_group=8: expected at least 2, for int8 scales"),
    ("int4 g64 sym int8/1", "super_group=1: expected at least 2, for int8 scales"),
    ("int9 g64 sym fp16", "element type 'int9': expected one of int2, .*fp8"),
    ("nf4 g64 min fp16", "nf4: expected symmetric=True"),
    ("int4 g32 min int8", "scales of 8 bits with minima: expected scales of fp16, bf16 or fp32"),
    ("int4 g64 sym fp17", "expected a format like 'int4 g64 sym fp16', got 'int4 g64 sym fp17'"),
    ("int4 g64 sym fp16 more", "expected a format like"),
    ("", "expected a format like"),
])  # fmt: skip
def test_formats_that_do_not_exist_are_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_format(text)
    with pytest.raises(ArtifactError, match=r"file: expected a format that exists, got .*; compile again"):
        format_of(text, "file")


def test_an_element_of_another_width_is_refused() -> None:
    assert element_of("int", 3) is ELEMENTS["int3"]
    with pytest.raises(FormatError, match="element type 'nf4': expected 4 bits, got 8"):
        element_of("nf4", 8)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 41), seed=st.integers(0, 99))
def test_codes_are_a_stream_of_bits_low_bits_first(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (place * bits) for place, code in enumerate(row))
        assert int.from_bytes(bytes(stored), "little") == stream


@pytest.mark.parametrize("element", [NF4, FP4, FP8, *(ELEMENTS[f"int{bits}"] for bits in range(2, 9))], ids=lambda item: item.name)
def test_every_level_of_an_element_is_its_own_nearest(element: object) -> None:
    assert element in ELEMENTS.values()
    kind = element_of(element.kind, element.bits)  # type: ignore[attr-defined]
    codes = torch.arange(kind.levels, dtype=torch.uint8)
    levels = decode(codes, kind, None, torch.float32)
    finite = levels.isfinite()  # fp8 has two codes for NaN
    assert int((~finite).sum()) == (2 if kind is FP8 else 0)
    assert torch.equal(snap(levels[finite], kind), levels[finite])
    assert torch.equal(decode(encode(levels[finite], kind), kind, None, torch.float32), levels[finite])
    between = torch.linspace(-1.2, 1.2, 2001) * float(levels[finite].abs().max())
    distance = (between.unsqueeze(1) - levels[finite]).abs().amin(1)
    torch.testing.assert_close((between - snap(between, kind)).abs(), distance, rtol=0, atol=1e-6 * float(levels[finite].max()))


def on_grid(form: QuantFormat, seed: int) -> tuple[Tensor, Quantized]:
    """A weight that the format holds exactly, with the ends of the range in every group; and its packed form."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, element = 3, 80, form.element
    groups = form.granularity.groups(columns)
    codes = torch.randint(0, element.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    levels = decode(codes, element, None, torch.float32).nan_to_num(1.0)
    size = form.granularity.size(columns)
    end = float(-element.largest if element.largest else element.low)
    levels[:, ::size] = end
    if element.is_integer:
        levels[:, 1::size] = float(element.high)
    powers = 2.0 ** torch.randint(-3, 1, (rows, groups), generator=generator).float()
    powers[:, 0] = 1.0
    scale2 = second_level(powers, form)
    stored = store(powers, scale2, form, "w")
    step = effective(stored, scale2, torch.float32)
    if form.minimum:
        least = (step * element.low).to(form.scale_dtype)
        return levels * step.repeat_interleave(size, 1)[:, :columns], Quantized(pack(encode(levels, element), element.bits), stored, least)
    zero = None if form.symmetric else pack(torch.full((rows, groups), -element.low, dtype=torch.uint8), element.bits)
    packed = Quantized(pack(encode(levels, element), element.bits), stored, zero, scale2)
    return levels * step.repeat_interleave(size, 1)[:, :columns], packed


@pytest.mark.parametrize("text", FORMATS)
def test_a_weight_on_its_own_grid_stays_as_it_is(text: str) -> None:
    form = parse_format(text)
    weight, packed = on_grid(form, 0)
    torch.testing.assert_close(restore(packed, form, 80), weight, rtol=1e-6, atol=0)
    again = restore(quantize(weight, form), form, 80)
    torch.testing.assert_close(again, weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("text", FORMATS)
def test_bits_are_those_of_the_tensors_stored(text: str) -> None:
    form = parse_format(text)
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, form)
    tensors = {part: getattr(packed, part) for part in form.parts}
    assert stored_bits(form, 6, 100) == sum(8 * tensor.nbytes for tensor in tensors.values())
    lazy = rounded_constants(tensor_constant(weight), form, "w")
    assert list(lazy) == list(form.parts)
    for part, constant in lazy.items():
        assert (constant.shape, constant.dtype) == (tuple(tensors[part].shape), tensors[part].dtype)
        left, right = constant.materialize(), tensors[part]
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize(("text", "bits"), [
    ("int3 g64 sym fp16", 3.25), ("int2 g64 asym fp16", 2.28125), ("int4 g64 sym fp16", 4.25), ("int4 g32 sym int8", 4.25 + 16 / 1024),
    ("int4 g32 min fp16", 5.0), ("int5 g64 min bf16", 5.5),
    ("int4 g32 asym int8/8", 4.375 + 16 / 256), ("fp4 g32 sym e8m0", 4.25), ("fp4 g16 sym e4m3", 4.5 + 32 / (64 * 1024)),
])  # fmt: skip
def test_bits_per_weight(text: str, bits: float) -> None:
    assert stored_bits(parse_format(text), 64, 1024) / (64 * 1024) == bits


@pytest.mark.parametrize("text", FORMATS)
def test_error_is_bounded_by_the_widest_gap_between_levels(text: str) -> None:
    """Half the widest gap, and what rounding the scale to its storage type moves the ends of the range by."""
    form = parse_format(text)
    weight = torch.randn(8, 150, generator=torch.Generator().manual_seed(1))
    error = (restore(quantize(weight, form), form, 150) - weight).abs()
    element = form.element
    gaps = decode(torch.arange(element.levels, dtype=torch.uint8), element, None, torch.float32).nan_to_num(0.0).sort().values.diff()
    groups = torch.nn.functional.pad(weight, (0, -150 % form.granularity.size(150))).view(8, -1, form.granularity.size(150))
    span = groups.abs().amax(-1) if form.symmetric else groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    unit = span / (element.largest or (-element.low if form.symmetric else element.levels - 1))
    # Asymmetric: the zero point is rounded too. A symmetric integer has one code less at the far end. e8m0 at most doubles the step.
    gap = float(gaps.max()) * (1.0 if element.is_integer else 0.5) * (2.0 if form.scale_dtype == torch.float8_e8m0fnu else 1.0)
    coarse = {torch.int8: 1 / 127, torch.float8_e4m3fn: 1 / 16, torch.bfloat16: 1 / 256}.get(form.scale_dtype, 1 / 1024)
    moved = coarse * span.amax(1, keepdim=True).expand_as(span) if form.second_level else coarse * span
    bound = (unit * gap + moved).repeat_interleave(form.granularity.size(150), 1)[:, :150]
    assert bool((error <= bound + 1e-6).all())


def test_minima_come_back_from_what_they_stand_for_bit_for_bit() -> None:
    """Codes, scales and minima, where each group has both its ends: all of them float16 as in GGUF, down to its smallest numbers."""
    generator = torch.Generator().manual_seed(6)
    form = parse_format("int4 g32 min fp16")
    codes = torch.randint(0, 16, (40, 96), dtype=torch.uint8, generator=generator)
    codes[:, 3::32], codes[:, 9::32] = 0, 15
    scale = (
        (torch.randn(40, 3, generator=generator).abs() * 10.0 ** torch.randint(-6, 1, (40, 1), generator=generator)).clamp(min=1e-7).half()
    )
    least = (scale.float() * torch.randn(40, 3, generator=generator) * 8).half()
    packed = Quantized(pack(codes, 4), scale, least)
    again = quantize(restore(packed, form, 96), form)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scale, scale)
    assert again.zero is not None
    assert torch.equal(again.zero, least)
    assert float((scale < 6e-5).float().mean()) > 0.1  # below the normal float16


def test_a_group_of_one_value_is_its_minimum() -> None:
    form = parse_format("int4 g16 min fp32")
    weight = torch.full((2, 20), 0.1)
    assert torch.equal(restore(quantize(weight, form), form, 20), weight)


def test_minima_serve_groups_far_from_zero_that_zero_points_cannot() -> None:
    weight = 10 + torch.rand(4, 32, generator=torch.Generator().manual_seed(7))
    errors = {text: (restore(quantize(weight, form), form, 32) - weight).abs().max()
              for text in ("int4 g32 min fp16", "int4 g32 asym fp16") for form in (parse_format(text),)}  # fmt: skip
    assert errors["int4 g32 min fp16"] < 0.04
    assert errors["int4 g32 asym fp16"] > 0.2


def test_minima_that_do_not_belong_to_the_scales_are_refused() -> None:
    form = parse_format("int4 g16 min fp16")
    packed = quantize(torch.randn(2, 32), form)
    assert packed.zero is not None
    for zero, found in ((packed.zero.float(), r"torch.float32 \[2, 2\]"), (packed.zero[:, :1], r"torch.float16 \[2, 1\]")):
        with pytest.raises(FormatError, match=rf"minima are {found}: expected torch.float16 \[2, 2\] as the scales are; requantize"):
            restore(Quantized(packed.codes, packed.scale, zero), form, 32)
    with pytest.raises(WeightError, match=r"w: a minimum of 1e\+05 does not fit torch.float16; choose a format with fp32 scales"):
        quantize(torch.tensor([[-1e5, -1e5 + 1]]), form, "w")


@pytest.mark.parametrize("text", ["int8 g32 sym fp16", "int4 g32 sym fp16", "int8 channel sym fp32"])
@pytest.mark.parametrize("end", ["low", "high"])
def test_a_symmetric_weight_that_was_rounded_before_comes_back_bit_for_bit(text: str, end: str) -> None:
    """Whether its greatest magnitude has the code -2^(b-1) (llama.cpp's Q4_0) or 2^(b-1) - 1 (its Q8_0), among groups that have not."""
    form, generator = parse_format(text), torch.Generator().manual_seed(8)
    element, size = form.element, form.granularity.size(96)
    levels = torch.randint(-element.high, element.high, (30, 96), generator=generator).float()
    levels[:, ::size] = float(element.low if end == "low" else element.high)
    scale = (torch.rand(30, 96 // size, generator=generator) * 1e-3).to(form.scale_dtype)
    weight = levels * scale.float().repeat_interleave(size, 1)
    weight[7] = torch.randn(96, generator=generator)
    rows = [row for row in range(30) if row != 7]
    packed = quantize(weight, form)
    assert torch.equal(restore(packed, form, 96)[rows], weight[rows])
    assert torch.equal(packed.scale[rows], scale[rows])
    alone = quantize(weight[7:8], form)
    assert torch.equal(alone.scale, packed.scale[7:8])


def test_double_quantization_moves_no_weight_by_more_than_half_a_second_step() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    single, double = parse_format("int4 g32 sym fp32"), parse_format("int4 g32 sym int8")
    packed, exact = quantize(weight, double), quantize(weight, single)
    assert packed.scale2 is not None
    scales = effective(packed.scale, packed.scale2, torch.float32)
    # int8 codes are rounded to half a step; the top one may also be cut by the float16 of its row (2^-11 of 127 steps).
    assert bool(((scales - exact.scale).abs() <= packed.scale2.float() * (0.5 + 127 / 2048)).all())


def test_a_shorter_last_group_has_its_own_scale_in_every_second_level() -> None:
    for text in ("int4 g32 sym int8/2", "int4 g32 sym int8", "fp4 g16 sym e4m3"):
        form = parse_format(text)
        weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(3))
        weight[:, 64:] *= 0.1
        error = (restore(quantize(weight, form), form, 70) - weight).abs()
        assert error[:, 64:].max() < 0.15 * weight[:, 64:].abs().max()


def test_group_sizes_may_be_anything_from_two_up() -> None:
    weight = torch.randn(2, 97, generator=torch.Generator().manual_seed(4))
    for size in (2, 3, 7, 33, 96, 97, 200, -1):
        form = QuantFormat(ELEMENTS["int8"], Granularity(size))
        assert (restore(quantize(weight, form), form, 97) - weight).abs().max() < 0.02
