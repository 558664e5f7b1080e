"""Presets, options and targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.errors import FormatError, OptionError, TargetError
from qcompile.quant.element import element
from qcompile.quant.granularity import Granularity
from qcompile.quant.scheme import FP32, SCHEMES, W4A16, QuantFormat, scheme
from qcompile.quant.scheme_options import SchemeOptions, given_options
from qcompile.target import known_targets, parse_target


def test_every_known_target_prints_as_it_is_written() -> None:
    for name in known_targets():
        assert str(parse_target(name)) == name


@pytest.mark.parametrize(("text", "compute", "cache"), [
    ("cpu-int4", torch.float32, torch.float32),
    ("cpu-bf16", torch.bfloat16, torch.bfloat16),
    ("cpu-int4-kv16", torch.float32, torch.float16),
    ("sm90-int4", torch.bfloat16, torch.bfloat16),
    ("sm90-fp16-kv16", torch.float16, torch.bfloat16),
    ("SM90-W4A16kv16", torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_dtypes_follow_from_architecture_and_cache(text: str, compute: torch.dtype, cache: torch.dtype) -> None:
    target = parse_target(text)
    assert (target.compute, target.cache_dtype) == (compute, cache)


@pytest.mark.parametrize(("text", "message"), [
    ("tpu-int4", "expected ARCH-SCHEME.* as one of cpu-fp32"),
    ("sm90-int5", "scheme 'int5' is not served on sm90; expected one of .*sm90-int4"),
    ("cpu-fp16", "scheme 'fp16' is not served on cpu"),
    ("cpu-int4-kv3", "cache 'kv3' is unknown; expected kv16, kv8, kv8-static, kvfp8, kv4, "),
])  # fmt: skip
def test_an_unknown_target_lists_the_known_ones(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_target(text)


def test_names_of_compressed_tensors_are_accepted() -> None:
    assert scheme("W4A16") is W4A16
    with pytest.raises(TargetError, match="scheme 'w3': expected one of " + ", ".join(SCHEMES)):
        scheme("w3")


def test_weight_options_need_quantized_weights() -> None:
    assert str(W4A16.with_options(group_size=32, symmetric=False).weight) == "int4 g32 asym fp16"
    with pytest.raises(FormatError, match="scheme fp32: expected quantized weights for group_size"):
        FP32.with_options(group_size=32)


def test_a_weight_format_is_given_as_text() -> None:
    assert str(W4A16.with_options(weight_format="nf4 g36 sym int8").weight) == "nf4 g36 sym int8"
    assert str(FP32.with_options(weight_format="int3 g64 sym fp16", symmetric=False).weight) == "int3 g64 asym fp16"
    with pytest.raises(FormatError, match="expected a format like 'int4 g64 sym fp16', got 'int4'"):
        W4A16.with_options(weight_format="int4")


def test_activation_options_need_quantized_activations() -> None:
    changed = scheme("w4a4").with_options(activation_group_size=32, activation_symmetric=False, activation_clip=0.9)
    assert str(changed.activation) == "int4 g32 asym dynamic clip 0.9"
    assert str(scheme("w8a8").with_options(activation_static=True).activation) == "int8 tensor sym static"
    with pytest.raises(FormatError, match="expected quantized activations for activation_group_size, activation_clip, got float"):
        W4A16.with_options(activation_group_size=32, activation_clip=0.9)
    with pytest.raises(FormatError, match="static activations in g64: expected one scale for the tensor; set activation_group_size=-1"):
        scheme("w4a4").with_options(activation_static=True)


def test_cache_options_need_a_packed_cache() -> None:
    cache = parse_target("cpu-fp32-kv4-kivi").scheme.with_options(cache_values="int3 g16", cache_sinks=0, cache_window=128).cache
    assert cache.forms() == ("int4 t32 asym", "int3 g16 asym")
    assert (cache.retention.first, cache.retention.recent, cache.retention.group) == (0, 128, 32)
    with pytest.raises(FormatError, match="cache kv16: expected a packed one for cache_keys, cache_sinks; choose"):
        parse_target("cpu-fp32-kv16").scheme.with_options(cache_keys="int4", cache_sinks=2)
    with pytest.raises(FormatError, match="cache_window=-1: expected a number of tokens"):
        parse_target("cpu-fp32-kv4").scheme.with_options(cache_window=-1)


def test_none_leaves_the_scheme_as_it_is() -> None:
    assert W4A16.with_options(**dict.fromkeys(SchemeOptions.__annotations__)) == W4A16


@pytest.mark.parametrize(("options", "message"), [
    ({"group_sizes": 32}, "option 'group_sizes': expected a parameter .* or one of weight_format, .*; did you mean group_size"),
    ({"zzz": None}, "option 'zzz': expected a parameter of the function, or one of weight_format, .*, cache_bits$"),
    ({"group_size": "32"}, "group_size='32': expected an integer"),
    ({"group_size": True}, "group_size=True: expected an integer"),
    ({"symmetric": 0}, "symmetric=0: expected True or False"),
    ({"ignore": "lm_head"}, "ignore='lm_head': expected a list of names"),
    ({"ignore": [3]}, r"ignore=\[3\]: expected a list of names"),
    ({"activation_clip": "0.9"}, "activation_clip='0.9': expected a number above 0"),
    ({"weight_format": 4}, "weight_format=4: expected text such as 'int4 g64 sym fp16'"),
])  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scheme("w8a8").with_options(**options)


def test_every_option_is_documented_and_checked() -> None:
    names = set(SchemeOptions.__annotations__)
    document = (Path(__file__).parents[2] / "docs" / "formats-and-kernels.md").read_text()
    assert names <= set(re.findall(r"`(\w+)`", qcompile.compile.__doc__ or ""))
    assert names <= set(re.findall(r"`(\w+)`", document))
    given_options(dict.fromkeys(names))


@pytest.mark.parametrize(("name", "size"), [("nvfp4", 32), ("mxfp4", 16), ("mxint8", 64)])
def test_formats_of_a_standard_keep_its_group_size(name: str, size: int) -> None:
    with pytest.raises(FormatError, match=rf"group_size={size}: (NVFP4|MX) wants groups of (16|32); leave group_size out"):
        scheme(name).with_options(group_size=size)


@pytest.mark.parametrize("size", [0, 1, -2])
def test_a_group_size_that_no_format_holds_says_which_it_can(size: int) -> None:
    with pytest.raises(FormatError, match=rf"group_size={size}: expected -1 \(one scale per channel\) or at least 2"):
        Granularity(size)


def test_unknown_elements_and_scale_types_are_refused() -> None:
    with pytest.raises(FormatError, match="element type 'int9': expected one of int2, int3"):
        element("int9")
    with pytest.raises(FormatError, match=r"scale_dtype=torch\.int32: expected one of float16, bfloat16, float32, int8"):
        QuantFormat(element("int4"), scale_dtype=torch.int32)
