"""Models with quantized activations end to end: compiled, run by every CPU engine, saved and loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.runtime.engines.reference import ReferenceEngine
from qcompile.runtime.engines.torch_cpu import TorchCpuEngine
from tests.models import example_inputs, tiny
from tests.runtime.test_engines import CONTEXT, PROMPTS, STEPS, assert_close, by_graph, engine_of, run

SCHEMES = ("w8a8", "w4a8", "w4a4", "fp8")


@cache
def compiled(family: str, scheme: str, *quantized: str) -> CompiledModel:
    """A tiny model for three sequences, rounded to nearest; `quantized` names what is quantized beside the layers."""
    options: Any = {f"quantize_{name}": True for name in quantized}
    return qcompile.compile(
        tiny(family), f"cpu-{scheme}", recipe="nearest", max_batch=3, max_context=CONTEXT, **options, engine="torch_cpu"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_the_reference(family: str, scheme: str) -> None:
    model = compiled(family, scheme)
    fast = run(engine_of(TorchCpuEngine, model), PROMPTS, STEPS)
    exact = run(engine_of(ReferenceEngine, model), PROMPTS, STEPS)
    for got, expected in zip(fast, exact, strict=True):
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_the_reference_does_not_depend_on_its_batch(scheme: str) -> None:
    model = compiled("llama", scheme)
    together = run(engine_of(ReferenceEngine, model), PROMPTS, STEPS[:1])
    for row, prompt in enumerate(PROMPTS):
        alone = run(engine_of(ReferenceEngine, model), [prompt], [[STEPS[0][row]]])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("scheme", "group_size"), [("w8a8", -1), ("w4a4", 16)])
def test_asymmetric_activations_come_from_their_producers(scheme: str, group_size: int) -> None:
    model = qcompile.compile(
        tiny("llama"), f"cpu-{scheme}", recipe="nearest", max_batch=3, max_context=CONTEXT, group_size=group_size,
        activation_symmetric=False, activation_group_size=group_size, engine="torch_cpu",
    )  # fmt: skip
    made = {row.operator for row in model.coverage if row.operator.endswith("_asym")}
    assert {"norm_quantize_asym", "add_norm_quantize_asym", "gated_quantize_asym"} <= made
    fast = run(engine_of(TorchCpuEngine, model), PROMPTS, STEPS)
    exact = run(engine_of(ReferenceEngine, model), PROMPTS, STEPS)
    for got, expected in zip(fast, exact, strict=True):
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
    for row, prompt in enumerate(PROMPTS):
        alone = run(engine_of(ReferenceEngine, model), [prompt], [[step[row]] for step in STEPS])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(exact, alone, strict=True))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
@pytest.mark.parametrize("quantized", [("head",), ("head", "embedding")])
def test_a_quantized_head_sees_only_the_last_token(scheme: str, quantized: tuple[str, ...]) -> None:
    """Prefill gathers codes and scales before the head; a tied head's codes are read by the embedding too."""
    model = compiled("llama", scheme, *quantized)
    for kind in (ReferenceEngine, TorchCpuEngine):
        (logits,) = run(engine_of(kind, model), PROMPTS, [])
        for row, prompt in enumerate(PROMPTS):
            assert_close(logits[row], by_graph(model, prompt)[-1], 1e-4)


def test_a_packed_cache_and_quantized_activations_go_together() -> None:
    options: Any = {"cache_keys": "int4 t8 asym", "cache_window": 4}  # so that tokens are packed in so few
    model = qcompile.compile(
        tiny("llama"), "cpu-w4a8-kv4", recipe="nearest", max_batch=3, max_context=CONTEXT, **options, engine="torch_cpu"
    )
    fast = run(engine_of(TorchCpuEngine, model), PROMPTS, STEPS)
    exact = run(engine_of(ReferenceEngine, model), PROMPTS, STEPS)
    for got, expected in zip(fast, exact, strict=True):
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_an_encoder_is_close_to_its_float_model(scheme: str) -> None:
    model, inputs = tiny("bert"), example_inputs("bert")
    made = qcompile.compile(model, f"cpu-{scheme}", recipe="nearest", example_inputs=inputs, engine="torch_cpu")
    with torch.no_grad():
        expected = model.eval()(**inputs).last_hidden_state
    got = made(**inputs)["last_hidden_state"]
    # 8-bit steps are 1/128 of the extreme, 4-bit steps 1/8; a few layers add up.
    assert (got - expected).abs().max() / expected.abs().max() <= {"w8a8": 0.05, "w4a8": 0.5}[scheme]


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w4a4"])
def test_what_is_saved_loads_and_gives_the_same_logits(scheme: str, tmp_path: Path) -> None:
    model = compiled("llama", scheme)
    ids = torch.tensor([PROMPTS[0]])
    model.save(tmp_path / "model")
    loaded = qcompile.load(tmp_path / "model")
    assert torch.equal(loaded(input_ids=ids)["logits"], model(input_ids=ids)["logits"])
    assert loaded.bits_per_weight == model.bits_per_weight
    assert [row.activation for row in loaded.coverage] == [row.activation for row in model.coverage]


def test_weights_take_the_bits_of_their_format_whatever_reads_them() -> None:
    assert compiled("llama", "w8a8").bits_per_weight == compiled("llama", "int8").bits_per_weight
    assert compiled("llama", "w4a8").bits_per_weight == compiled("llama", "int4").bits_per_weight


def test_a_network_of_convolutions_is_close_to_its_float_model() -> None:
    model, inputs = tiny("resnet"), example_inputs("resnet")
    data = [{name: torch.randn_like(value) for name, value in inputs.items()} for _ in range(4)]
    made = qcompile.compile(model, "cpu-w8a8", recipe="nearest", example_inputs=inputs, calibration=data, engine="torch_cpu")
    with torch.no_grad():
        expected = model.eval()(**inputs).pooler_output
    assert (made(**inputs)["pooler_output"] - expected).abs().max() / expected.abs().max() <= 0.05
    assert {row.operator for row in made.coverage} == {"quantize_static", "integer_conv2d"}
    assert 8 < made.bits_per_weight < 9
