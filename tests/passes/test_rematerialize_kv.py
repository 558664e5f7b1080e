"""Caches of what keys and values are made from: where they apply, what they take, what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.codegen.select import backend_for
from qcompile.compiled import CompiledModel
from qcompile.errors import CoverageError, UnsupportedModelError
from qcompile.frontend import load
from qcompile.passes.base import PassContext
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.quant.vector_format import vector_format
from qcompile.target import parse_target
from tests.models import tiny

TEXT = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 100, (4, 64), generator=torch.Generator().manual_seed(1))
INT4 = {"cache_keys": "int4 g64 asym", "cache_values": "int4 g64 asym"}
"""The form of kv4-xquant, for a cache of keys and values."""
WIDE = {"hidden_size": 256, "head_dim": 64}


def compiled(model: nn.Module, target: str, **options: Any) -> CompiledModel:
    return qcompile.compile(model, target, calibration=CALIBRATION, max_batch=2, engine="torch_cpu", **{"max_context": 128, **options})


def logits(model: CompiledModel) -> Tensor:
    return CompiledModel(model.contents, max_batch=1, max_context=64, engine="reference")(input_ids=TEXT)["logits"][0]


def decoded(model: CompiledModel, prompt: int) -> Tensor:
    alone = CompiledModel(model.contents, max_batch=1, max_context=64, engine="reference")
    first = alone.engine.prefill([TEXT[0, :prompt].tolist()])
    return torch.cat([first, *(alone.engine.decode([token]) for token in TEXT[0, prompt:].tolist())])


def require_decoding(model: CompiledModel) -> None:
    """The logits of decoding are those of reading at once, to 2e-5 of the largest."""
    at_once = logits(model)[8:]
    torch.testing.assert_close(decoded(model, 9), at_once, rtol=0, atol=2e-5 * float(at_once.abs().max()))


def states(model: CompiledModel) -> list[str]:
    """Those of a cache that keeps tokens in 16 bits have rows for them beside their pages."""
    names = [node.name for node in model.contents.graph.states]
    rows = {name for name in names if name.startswith("recent_")}
    pages = [name for name in names if name not in rows]
    assert rows == ({f"recent_{name}" for name in pages} if model.kv_bytes_per_sequence else set())
    return pages


def grouped(low_rank: tuple[int, ...] = ()) -> nn.Module:
    """One key/value head of four; projections of layers in `low_rank` have rank 40 together."""
    model = tiny("llama", **WIDE, num_key_value_heads=1)
    generator = torch.Generator().manual_seed(2)
    for index in low_rank:
        attention = model.model.layers[index].self_attn  # type: ignore[union-attr, index]
        shared = torch.randn(40, 256, generator=generator)
        for linear in (attention.k_proj, attention.v_proj):  # type: ignore[union-attr]
            linear.weight.data = 0.025 * torch.randn(64, 40, generator=generator) @ shared  # type: ignore[union-attr]
    return model


def test_with_as_many_heads_a_token_takes_half_the_bytes_of_keys_and_values() -> None:
    model = tiny("llama", **WIDE, num_key_value_heads=4)
    plain, sources = compiled(model, "cpu-fp32-kv8", **INT4), compiled(model, "cpu-fp32-kv4-xquant")
    assert plain.kv_bytes_per_token == 2 * 2 * 4 * 36
    assert sources.kv_bytes_per_token == plain.kv_bytes_per_token // 2
    assert sources.kv_bytes_per_sequence == 2 * 4 * 256 * 2, "the first four tokens of two layers in 16 bits"
    assert states(sources) == ["sources_0", "sources_1"]
    require_decoding(sources)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_sinks": 0},
        {"cache_sinks": 0, "cache_window": 9},
        {"cache_window": 5},
        {"cache_window": 3, "cache_keys": "int4 t8 asym"},
        {"cache_sinks": 0, "cache_keys": "gear16 r2 s1 int2 t16 asym"},
    ],
)
def test_sinks_windows_and_groups_are_those_of_any_cache(options: dict[str, Any]) -> None:
    """Bytes by the formula, decoding as reading at once, and the rows of a ragged batch bit for bit as each is alone."""
    model = compiled(tiny("llama", num_key_value_heads=4), "cpu-fp32-kv4-xquant", **options)
    cache = parse_target("cpu-fp32-kv4-xquant").scheme.with_options(**options).cache
    assert states(model) == ["sources_0", "sources_1"]
    assert model.kv_bytes_per_token == 2 * vector_format(cache.forms()[0]).width(32)
    assert model.kv_bytes_per_sequence == 2 * cache.retention.rows * 32 * 2
    assert {(layer.sinks, layer.window) for layer in model.cache_layers} == {(cache.sinks, cache.window)}
    require_decoding(model)
    both = CompiledModel(model.contents, max_batch=2, max_context=64, engine="reference").engine
    prompts = [TEXT[0, :21].tolist(), TEXT[0, 5:12].tolist()]
    together = [both.prefill(prompts), *(both.decode([token, token]) for token in TEXT[0, 21:30].tolist())]
    for row, prompt in enumerate(prompts):
        alone = CompiledModel(model.contents, max_batch=1, max_context=64, engine="reference").engine
        expected = [alone.prefill([prompt]), *(alone.decode([token]) for token in TEXT[0, 21:30].tolist())]
        assert all(torch.equal(found[row], one[0]) for found, one in zip(together, expected, strict=True))


def test_tokens_in_16_bits_lose_only_what_16_bits_lose() -> None:
    """A window over the whole text: what rounding to float16 leaves, where 4 bits leave a hundred times as much."""
    model = tiny("llama")
    exact = logits(compiled(model, "cpu-fp32"))
    packed, kept = (logits(compiled(model, "cpu-fp32-kv4-xquant", cache_window=window)) for window in (0, 40))
    assert (kept - exact).norm() < 2e-3 * exact.norm()
    assert (kept - exact).norm() < 0.01 * (packed - exact).norm()


@pytest.mark.parametrize(("window", "as_they_are"), [(0, True), (4000, False)])
def test_rows_count_where_bytes_are_compared(window: int, as_they_are: bool) -> None:
    """64 numbers take 36 bytes as one vector, 40 of them 60 as ten heads of 4; but of 4004 tokens in 16 bits 40 take less."""
    model = tiny("llama", hidden_size=64, head_dim=4, num_attention_heads=10, num_key_value_heads=5)
    found = compiled(model, "cpu-fp32-kv4-xquant", cache_window=window, max_context=4096)
    assert states(found) == ["sources_0", "sources_1"]
    rows = [node.meta["val"].shape for node in found.contents.graph.states if node.name.startswith("recent_")]
    assert all(shape[1:3] == (1, 4 + window) for shape in rows)
    assert all(shape[3] == 64 if as_they_are else shape[3] <= 40 for shape in rows)
    assert found.kv_bytes_per_token == sum(vector_format("int4 g64 asym").width(int(shape[3])) for shape in rows)
    assert found.kv_bytes_per_sequence == sum((4 + window) * int(shape[3]) * 2 for shape in rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_finer_forms_come_near_the_float_cache(family: str) -> None:
    model = tiny(family)
    exact = logits(compiled(model, "cpu-fp32"))
    errors = []
    for bits in (4, 8):
        form = f"int{bits} g64 asym"
        found = compiled(model, "cpu-fp32-kv4-xquant", cache_keys=form, cache_values=form)
        assert states(found) == ["sources_0", "sources_1"]
        errors.append(float((logits(found) - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] / 8  # a seventeenth of the step: what is left is rounding, and nothing else


def test_shared_heads_cache_a_latent_where_it_takes_fewer_bytes_and_keys_and_values_elsewhere() -> None:
    model = compiled(grouped(low_rank=(1,)), "cpu-fp32-kv4-xquant")
    assert states(model) == ["keys_0", "values_0", "sources_1"]
    assert model.kv_bytes_per_token == 2 * 36 + 36  # a latent of 64 numbers
    attentions = {row.operator: row for row in model.coverage if "attend" in row.operator}
    left = attentions["attend_settled"]
    assert "what they are made from takes 128 numbers, and no fewer bytes" in left.reason
    assert left.chosen
    assert not attentions["attend_settled_sources"].reason
    assert model.kv_bytes_per_sequence == 4 * (128 + 64) * 2, "four tokens of a key and a value of 64 numbers, and of the latent"
    require_decoding(model)
    cache = CompiledModel(model.contents, max_batch=2, max_context=64).engine.cache  # type: ignore[attr-defined]
    allocated = sum(tensor.nbytes for tensor in cache.tensors.values())
    assert allocated == cache.nbytes == 2 * (64 * model.kv_bytes_per_token + model.kv_bytes_per_sequence)


def test_a_latent_gives_what_keys_and_values_of_the_same_bits_give() -> None:
    model = grouped(low_rank=(0, 1))
    exact = logits(compiled(model, "cpu-fp32"))
    plain, sources = (logits(compiled(model, f"cpu-fp32-{name}", **INT4)) for name in ("kv8", "kv4-xquant"))
    assert (sources - exact).norm() < 1.5 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3", r"rms_norm\w* \(.*\): expected a linear of constant weights, then views and rotary positions alone before attention"),
        ("gpt_neox", r"cat\w* \(.*\): expected a linear of constant weights"),
    ],
)
def test_what_stands_between_projection_and_attention_is_refused_by_name(family: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rewrite-kv-cache: {message}.*choose a cache of keys and values, such as kv4"):
        compiled(tiny(family), "cpu-fp32-kv4-xquant")


def test_keys_and_values_of_different_inputs_are_refused() -> None:
    graph = load(tiny("llama")).graph
    value = graph.calls(torch.ops.aten.linear.default)[2]
    value.args = (graph.insert(value, torch.ops.aten.neg.default, (value.args[0],)), *value.args[1:])
    goal = parse_target("cpu-fp32-kv4-xquant")
    with pytest.raises(UnsupportedModelError, match=rf"{value.name} .*: expected keys and values made from the same value, rms_norm"):
        run_pipeline(graph, default_pipeline(goal), PassContext(goal))


@pytest.mark.parametrize(("name", "operator"), [("kv4-xquant", "attend_settled_sources"), ("kv4-zip", "attend_ranked")])
def test_gpus_serve_them_by_reference_and_say_so(name: str, operator: str) -> None:
    goal = parse_target(f"sm90-bf16-{name}")
    ctx = PassContext(goal, backend_for(goal))
    run_pipeline(load(tiny("llama")).graph, default_pipeline(goal), ctx)
    rows = [row for row in ctx.coverage if row.operator == operator]
    assert len(rows) == 2
    assert all(row.kernel == "reference" and f"refused by triton: {operator}: " in row.reason and not row.chosen for row in rows)


def test_projections_that_are_read_with_the_cache_keep_their_precision_and_strict_says_so() -> None:
    with pytest.raises(
        CoverageError, match=r"attend_settled_sources .*: the weights of its keys and values are read as numbers, not codes"
    ):
        qcompile.compile(tiny("llama"), "cpu-int4-kv4-xquant", recipe="nearest", strict=True, max_context=64, engine="torch_cpu")


@pytest.mark.parametrize(("name", "sinks"), [("kv4-xquant", 4), ("kv4-xquant", 0), ("kv4-zip", 4)])
def test_low_bit_weights_are_tuned_through_them(name: str, sinks: int) -> None:
    model = compiled(tiny("llama"), f"cpu-int4-{name}", cache_sinks=sinks)
    require_decoding(model)
