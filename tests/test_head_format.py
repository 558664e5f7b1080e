"""The output head in a format of its own: by default on CPUs, with the embedding that is the same matrix, at any recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import FormatError
from qcompile.quant.format import parse_format
from qcompile.quant.reference import quantize, restore
from qcompile.quant.scheme import FP32, HEAD, W4A16
from qcompile.target import parse_target
from tests.models import tiny

IDS = torch.arange(3, 23).view(2, 10)
TEXT = "int8 g32 sym fp16"


def formats(compiled: CompiledModel) -> dict[str, str]:
    """Operator of the head or the embedding -> format."""
    ends = ("lm_head.weight", "model.embed_tokens.weight")
    return {row.operator: row.format for row in compiled.coverage if row.weight in ends}


def nearest(family: str, target: str = "cpu-int4", **options: Any) -> CompiledModel:
    return qcompile.compile(tiny(family), target, recipe="nearest", **options)


def test_presets_of_cpus_with_integer_weights_have_one() -> None:
    assert str(HEAD) == TEXT
    heads = {name: parse_target(name).scheme.head for name in ("cpu-int4", "cpu-int2", "cpu-w8a8", "reference-int4", "cpu-int8-kv4")}
    assert set(heads.values()) == {HEAD}
    others = ("cpu-fp32", "cpu-bf16", "cpu-nf4", "cpu-fp8", "onnx-int4", "sm90-int4", "sm80-w4a8")
    assert {parse_target(name).scheme.head for name in others} == {None}


@pytest.mark.parametrize("target", ["cpu-int4", "reference-int8", "cpu-w8a8"])
def test_a_head_of_its_own_leaves_the_embedding_alone(target: str) -> None:
    """Also where activations are quantized, the head reads floats."""
    compiled = nearest("llama", target)
    assert formats(compiled) == {"quantized_linear": TEXT, "aten.embedding": "fp32"}
    assert {row.activation for row in compiled.coverage if row.weight == "lm_head.weight"} == {""}
    head = tiny("llama").lm_head.weight.data
    parts = [compiled.graph.constants[f"lm_head.weight.{part}"].materialize() for part in ("codes", "scale")]
    expected = quantize(head, HEAD)
    assert torch.equal(parts[0], expected.codes)
    assert torch.equal(parts[1], expected.scale)
    floats = nearest("llama", target, head_format="float")
    assert formats(floats) == {"aten.linear": "fp32", "aten.embedding": "fp32"}
    left, right = (model(IDS)["logits"] for model in (compiled, floats))
    error = float((left - right).abs().max() / right.abs().max())
    assert 1e-5 < error < 0.02  # a step is 1/128 of the largest of 32 weights


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path: Path) -> None:
    compiled = nearest("qwen2")
    assert formats(compiled) == {"quantized_linear": TEXT, "quantized_embedding": TEXT}
    names = [name for name in compiled.graph.constants if "embed_tokens" in name or "lm_head" in name]
    assert sorted(names) == ["model.embed_tokens.weight.codes", "model.embed_tokens.weight.scale"]
    compiled.save(tmp_path / "out")
    back = qcompile.load(tmp_path / "out")
    assert torch.equal(back(IDS)["logits"], compiled(IDS)["logits"])
    model = tiny("qwen2").eval()
    ignoring = nearest("qwen2", ignore=["re:layers"])
    model.model.embed_tokens.weight.data = restore(quantize(model.model.embed_tokens.weight.data, HEAD), HEAD, 32)
    with torch.no_grad():
        torch.testing.assert_close(ignoring(IDS)["logits"], model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-w8a8"])
def test_it_is_rounded_to_nearest_whatever_weights_are(target: str) -> None:
    compiled = qcompile.compile(tiny("llama"), target, disable=["smooth-activations", "learn-rotation"], calibration=IDS)
    logs = {name: constant.log[-1] for name, constant in compiled.graph.constants.items() if name.endswith(".codes")}
    assert logs.pop("lm_head.weight.codes") == f"quantize({TEXT}).codes"
    assert all("gptq" in log or "learned" in log for log in logs.values())


def test_options_change_it() -> None:
    assert formats(nearest("llama", head_format="int6 g16 asym bf16"))["quantized_linear"] == "int6 g16 asym bf16"
    assert formats(nearest("llama", "sm90-int4", head_format=TEXT))["quantized_linear"] == TEXT
    both = nearest("llama", quantize_head=True, quantize_embedding=True)
    assert formats(both) == {"quantized_linear": "int4 g64 sym fp16", "quantized_embedding": "int4 g64 sym fp16"}
    tied = nearest("qwen2", quantize_embedding=True)
    assert formats(tied) == {"quantized_linear": TEXT, "quantized_embedding": TEXT}
    ignored = nearest("llama", ignore=["lm_head"])
    assert formats(ignored) == {"aten.linear": "fp32", "aten.embedding": "fp32"}
    assert {row.reason for row in ignored.coverage if row.weight == "lm_head.weight"} == {"ignored by pattern 'lm_head'"}


def test_fast_matmuls_take_it_in() -> None:
    compiled = nearest("qwen2", matmul="fast", group_size=16)
    assert formats(compiled) == {"integer_linear": TEXT, "quantized_embedding": TEXT}
    oracle = nearest("qwen2", "reference-int4", matmul="fast", group_size=16)
    torch.testing.assert_close(compiled(IDS)["logits"], oracle(IDS)["logits"], rtol=1e-4, atol=1e-4)
    assert len(compiled.generate([[5, 6]], max_new_tokens=3, ignore_eos=True)[0]) == 3


def test_schemes_of_the_callers_own_have_the_head_that_they_say() -> None:
    assert formats(qcompile.compile(tiny("llama"), "cpu-int4", recipe="nearest", scheme=W4A16)) == {
        "aten.linear": "fp32", "aten.embedding": "fp32",
    }  # fmt: skip
    assert W4A16.with_options(head_format="int8 channel sym fp16").head == parse_format("int8 channel sym fp16")


def test_heads_that_do_not_exist_are_refused() -> None:
    with pytest.raises(
        FormatError, match="scheme fp32: expected quantized weights beside a head in int8 g32 sym fp16; choose int8 or int4"
    ):
        FP32.with_options(head_format=TEXT)
    with pytest.raises(FormatError, match="expected a format like 'int4 g64 sym fp16', got 'int8'"):
        W4A16.with_options(head_format="int8")
