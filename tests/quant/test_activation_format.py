"""Formats of activations: what exists, how they print, and how static ranges are chosen."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import FormatError, TargetError
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.activations import dequantize, encode
from qcompile.quant.element import FP8, INT4, INT8, NF4
from qcompile.quant.granularity import Granularity
from qcompile.quant.scheme import FP32, W4A4, W8A8, scheme
from qcompile.quant.static_range import static_range
from qcompile.target import known_targets, parse_target


def test_formats_print_what_shares_a_scale() -> None:
    assert str(ActivationFormat()) == "int8 token sym dynamic"
    assert str(ActivationFormat(INT4, Granularity(64), clip=0.9)) == "int4 g64 sym dynamic clip 0.9"
    assert str(ActivationFormat(INT8, symmetric=False, static=True)) == "int8 tensor asym static"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"element": NF4}, "activations in nf4: expected int2 … int8 or fp8"),
        ({"element": FP8, "symmetric": False}, "activations in fp8: expected symmetric=True"),
        ({"granularity": Granularity(64), "static": True}, "static activations in g64: expected one scale for the tensor"),
        ({"clip": 0.0}, "clip=0.0: expected a share of the range above 0 and at most 1"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ActivationFormat(**options)  # type: ignore[arg-type]


def test_presets_by_the_names_of_compressed_tensors() -> None:
    assert str(scheme("W8A8").activation) == "int8 token sym dynamic"
    assert (str(scheme("W4A8").weight), str(scheme("W4A8").activation)) == ("int4 g64 sym fp16", "int8 token sym dynamic")
    assert str(scheme("w4a4").activation) == "int4 g64 sym dynamic"
    assert (str(scheme("FP8_DYNAMIC").weight), str(scheme("FP8_DYNAMIC").activation)) == ("fp8 channel sym fp16", "fp8 token sym dynamic")
    assert scheme("W4A16").activation is None
    assert (str(scheme("NVFP4").weight), str(scheme("MXFP4").weight)) == ("fp4 g16 sym e4m3", "fp4 g32 sym e8m0")


def test_activation_options() -> None:
    assert str(W4A4.with_options(activation_group_size=-1, activation_clip=0.8).activation) == "int4 token sym dynamic clip 0.8"
    assert str(W8A8.with_options(activation_static=True, activation_symmetric=False).activation) == "int8 tensor asym static"
    assert W4A4.with_options(group_size=32).activation == W4A4.activation
    with pytest.raises(FormatError, match="scheme fp32: expected quantized activations for activation_static, got float activations"):
        FP32.with_options(activation_static=True)


def test_targets_with_quantized_activations() -> None:
    assert str(parse_target("cpu-W8A8")) == "cpu-w8a8"
    assert str(parse_target("sm90-w4a8kv4")) == "sm90-w4a8-kv4"
    assert str(parse_target("reference-fp8_dynamic")) == "reference-fp8"
    assert {"cpu-w8a8", "cpu-w4a8", "sm90-w4a4", "sm100-fp8"} <= set(known_targets())
    with pytest.raises(TargetError, match="scheme 'w2a2' is not served on cpu"):
        parse_target("cpu-w2a2")


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_of_least_error_is_no_worse_than_the_others(symmetric: bool) -> None:
    sample = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) ** 3
    form = ActivationFormat(INT4, symmetric=symmetric, static=True)

    def error(method: str) -> float:
        scale, zero = static_range(sample, form, method)
        codes = encode(sample, scale, zero, 4, -1)
        return float((dequantize(codes, scale, zero, -1, torch.float32) - sample).square().mean())

    assert error("mse") <= 0.75 * error("max")
    assert error("percentile") < error("max")


def test_the_extremes_are_kept_exactly_and_a_percentile_cuts_them() -> None:
    sample = torch.cat((torch.linspace(0, 1, 999), torch.tensor([100.0])))
    scale, zero = static_range(sample, ActivationFormat(static=True, symmetric=False), "max")
    assert torch.allclose(scale, torch.tensor([100 / 255]))
    assert zero is not None
    assert zero.tolist() == [-128]
    cut, _ = static_range(sample, ActivationFormat(static=True), "percentile", 0.99)
    assert abs(cut.item() * 128) < 2
    float8, none = static_range(sample, ActivationFormat(FP8, static=True), "max")
    assert none is None
    assert torch.allclose(float8, torch.tensor([100 / 448]))
    with pytest.raises(FormatError, match="static range 'best': expected one of max, percentile, mse"):
        static_range(sample, ActivationFormat(static=True), "best")
