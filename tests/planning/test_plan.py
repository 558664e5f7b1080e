"""plan(): what it takes, what it says, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qcompile
from qcompile.errors import OptionError, PipelineError, SourceError, TargetError, UnsupportedModelError
from qcompile.ir.layouts import LAYOUTS, apply_layout
from qcompile.passes.pipelines import default_pipeline, placed_passes
from qcompile.planning.hardware import DEVICES, device_for
from qcompile.planning.outlining import resident_bytes
from qcompile.target import parse_target
from tests.models import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of the tiny llama, without weights or tokenizer."""
    directory = tmp_path_factory.mktemp("bare")
    model: Any = tiny("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(directory)
    return directory / "config.json"


def test_a_configuration_alone_gives_the_plan_of_the_model(config: Path) -> None:
    tokens = torch.zeros(64, 128, dtype=torch.long)
    alone = qcompile.plan(config, "cpu-int8-kv4")
    model = qcompile.plan(tiny("llama"), "cpu-int8-kv4", calibration=tokens)
    assert "quantize-weights{rounding=gptq}" in alone.pipeline
    assert alone.size.weights == model.size.weights
    assert [row.format for row in alone.coverage] == [row.format for row in model.coverage]
    assert alone.pipeline == model.pipeline
    assert any("the configuration alone" in note for note in alone.notes)
    assert alone.model == config.parent.name
    assert "work cache" in alone.needs.disk


def test_a_configuration_of_any_name(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "llama-tiny.json"
    path.write_bytes(config.read_bytes())
    assert qcompile.plan(path, "cpu-int8", recipe="nearest").model == "llama-tiny"


@pytest.mark.parametrize("target", ["sm90-w4a4-kv4", "cpu-fp32-kv-mixed", "cpu-fp32-kv4-xquant", "sm80-int8"])
def test_every_pass_of_the_default_pipeline_has_a_reason(target: str) -> None:
    for recipe in ("best", "nearest"):
        placed = placed_passes(parse_target(target), recipe)
        assert [step for step, _ in placed] == default_pipeline(parse_target(target), recipe)
        assert all(reason for _, reason in placed)


def test_a_pipeline_of_the_users_own(config: Path) -> None:
    own = "canonicalize,raise-patterns,rewrite-kv-cache,convert-dtype,lower-to-kernels"
    plan = qcompile.plan(config, "cpu-fp32", passes=f"{own},plan-memory")
    assert ([item.spec for item in plan.passes], {item.reason for item in plan.passes}) == ([*own.split(","), "plan-memory"], {""})
    with pytest.raises(PipelineError, match="plan: expected a pipeline that ends in plan-memory, got canonicalize; add it"):
        qcompile.plan(config, "cpu-fp32", passes="canonicalize")


def test_forms_of_layers_are_assumed_within_their_budget(config: Path) -> None:
    plan = qcompile.plan(config, "cpu-fp32-kv-mixed", cache_bits=6.0)
    assert sum(layer.bytes_per_token for layer in plan.cache) * 8 <= 6.0 * sum(layer.numbers_per_token for layer in plan.cache)
    assert len({(layer.keys, layer.values) for layer in plan.cache}) > 1
    assert [(choice.step, choice.changes_structure) for choice in plan.choices] == [("assign-kv-formats", False)]
    assert plan.alternatives == ()


def test_whether_keys_and_values_have_a_short_source_is_open() -> None:
    """One head of them is narrower than the stream, so only the weights can tell: both ways are planned."""
    plan = qcompile.plan(tiny("llama", num_key_value_heads=1), "cpu-fp32-kv4-xquant", recipe="nearest")
    assert [choice.what for choice in plan.choices] == ["whether keys and values are made from a vector of few numbers"]
    assert len(plan.alternatives) == 1
    assert plan.size_range[0] < plan.size_range[1]
    assert {layer.keys for layer in plan.cache} == {"int4 g64 asym"}


def test_a_plan_is_json_and_text(config: Path) -> None:
    plan = qcompile.plan(config, "sm90-int4-kv8", recipe="nearest", ignore=["q_proj"])
    printed = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert printed["size"]["total"] == plan.size.total
    assert printed["speed"]["decode"]["bound"] == "bandwidth"
    assert "ignored by pattern 'q_proj'" in {row["reason"] for row in printed["coverage"]}
    text = plan.report()
    for part in ("first: every later pass may count on one spelling", "at most, not measured: H100", "peak memory", "ignored by pattern"):
        assert part in text


def test_decoding_reads_weights_and_cache(config: Path) -> None:
    """By hand: 5376 packed numbers a layer, the head in bf16, the embedding's one row, gains, and the cache of 128 tokens."""
    limits: dict[str, Any] = {"device_bandwidth": 1e9, "device_compute": 1e30, "recipe": "nearest", "max_context": 128}
    plan = qcompile.plan(config, "sm90-int8", **limits)
    assert plan.speed is not None
    layer = sum(rows * columns + 2 * rows for rows, columns in ((32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)))
    other = 2 * 100 * 32 + 2 * 32 + 5 * 2 * 32 + 4 * 4  # head, one row of the embedding, gains, frequencies
    cache = 2 * 2 * 2 * 16 * 128
    assert plan.speed.decode.read_bytes == 2 * layer + other + cache
    assert plan.speed.decode.tokens_per_second == pytest.approx(1e9 / plan.speed.decode.read_bytes)
    assert plan.speed.decode.bound == "bandwidth"
    half = qcompile.plan(config, "sm90-int8", **limits | {"max_context": 64})
    assert half.speed is not None
    assert plan.speed.decode.read_bytes - half.speed.decode.read_bytes == cache // 2


def test_prefill_multiplies(config: Path) -> None:
    plan = qcompile.plan(config, "sm90-int8", recipe="nearest", max_context=64, device_bandwidth=1e30, device_compute=1e9)
    assert plan.speed is not None
    linears = 2 * 2 * 64 * (32 * (32 + 16 + 16 + 32) + 3 * 48 * 32)
    attention = 2 * 2 * 4 * (64 * 65 // 2) * (8 + 8)
    head = 2 * 100 * 32  # of the last token alone
    assert plan.speed.prefill.operations == linears + attention + head
    assert plan.speed.prefill.tokens_per_second == pytest.approx(64 * 1e9 / plan.speed.prefill.operations)
    assert plan.speed.prefill.bound == "compute"


def test_torch_holds_packed_weights_unpacked(config: Path) -> None:
    packed, floats = (qcompile.plan(config, target, recipe="nearest", engine="torch_cpu") for target in ("cpu-int4", "cpu-fp32"))
    assert packed.memory.weights == floats.memory.weights
    assert packed.size.weights < floats.size.weights
    assert (packed.size.binaries, packed.notes[1:]) == (0, ())


def test_cpp_kernels_read_packed_weights(config: Path, tmp_path: Path) -> None:
    """What the native engine holds to the byte; a step reads codes and scales, also of the head, and of the embedding one row."""
    limits: dict[str, Any] = {"device_bandwidth": 1e9, "device_compute": 1e30, "recipe": "nearest", "max_context": 128}
    plan = qcompile.plan(config, "cpu-int8", **limits)
    made = qcompile.compile(tiny("llama"), "cpu-int8", recipe="nearest", max_context=128)
    made.save(tmp_path / "made")
    assert made.engine.name == "native"
    assert plan.memory == made.memory_plan
    layer = sum(rows * columns + 2 * rows for rows, columns in ((32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)))
    other = 100 * 32 + 2 * 100 + 4 * 32 + 5 * 4 * 32 + 4 * 4
    assert plan.speed is not None
    assert plan.speed.decode.read_bytes == 2 * layer + other + 2 * 2 * 4 * 16 * 128
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "made" / "kernels").iterdir()}
    assert plan.size.kernels == sum(size for name, size in on_disk.items() if not name.endswith(".so"))
    assert 0.3 < plan.size.binaries / sum(size for name, size in on_disk.items() if name.endswith(".so")) < 3
    assert "binaries of kernels are estimated: nothing was built" in plan.notes


def test_a_plan_without_a_compiler_says_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "none")
    plan = qcompile.plan(config, "cpu-int4", recipe="nearest")
    assert {row.kernel for row in plan.coverage if row.operator == "quantized_linear"} == {"torch_cpu.quantized_linear"}
    assert all("no C++ kernel: there is no C++ compiler" in row.reason for row in plan.coverage)
    assert any("torch_cpu will serve in place of native kernels: there is no C++ compiler" in note for note in plan.notes)


def test_layouts_are_known_from_shapes_alone() -> None:
    codes, shapes = torch.zeros(20, 24, dtype=torch.uint8), {}
    for name in LAYOUTS:
        shapes[name] = (apply_layout(name, codes).shape, apply_layout(name, codes.to("meta")).shape)
    assert all(real == known for real, known in shapes.values())


def test_a_cache_of_given_bytes(config: Path) -> None:
    plan = qcompile.plan(config, "cpu-fp32", recipe="nearest", kv_bytes=50_000, max_batch=2)
    assert 40_000 < plan.memory.cache_pages + plan.memory.cache_rows + plan.memory.page_tables <= 50_000


def test_peak_memory_starts_with_what_the_process_holds(config: Path) -> None:
    plan = qcompile.plan(config, "cpu-int8", recipe="nearest")
    assert 0.5 * resident_bytes() < plan.needs.program <= plan.needs.peak_memory
    assert plan.needs.peak_memory == plan.needs.program + max(plan.needs.phases.values())
    assert plan.needs.disk["artifact, built beside its place and renamed"] == plan.size.total
    assert "work cache" not in plan.needs.disk


def test_devices() -> None:
    target = parse_target("sm90-fp8")
    assert device_for(target).name == "H100"
    assert device_for(target, "h200").bandwidth == 4.8e12
    assert device_for(target).rate("fp8") == 2 * device_for(target).rate("") + 1e12
    assert device_for(parse_target("sm80-w8a8")).rate("fp8") == 312e12  # it has none: as bf16
    given = device_for(target, bandwidth=1e12, compute=2e12)
    assert (given.bandwidth, given.rate("fp8"), given.source) == (1e12, 2e12, "data sheet, as given")
    measured = device_for(parse_target("cpu-fp32"))
    assert 1e8 < measured.bandwidth < 1e13
    assert replace(measured, compute=1.0).rate("int8") == 1.0
    assert set(DEVICES) == {"sm80", "sm89", "sm90", "sm100"}


def _broken(directory: Path, content: str) -> Path:
    (directory / "config.json").write_text(content, encoding="utf-8")
    return directory / "config.json"


def test_bad_input_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"target 'sm91-int4': expected ARCH-SCHEME\[-KV\]"):
        qcompile.plan(config, "sm91-int4")
    with pytest.raises(PipelineError, match="recipe 'good': expected one of best, nearest"):
        qcompile.plan(config, "cpu-int4", recipe="good")
    with pytest.raises(OptionError, match=r"device 'B200': expected one of sm90 \(H100, H200\)"):
        qcompile.plan(config, "sm90-int4", device="B200")
    with pytest.raises(OptionError, match=r"device_bandwidth=-1: expected a number above 0"):
        qcompile.plan(config, "sm90-int4", device_bandwidth=-1.0)
    with pytest.raises(SourceError, match=r"config.json: expected JSON, got"):
        qcompile.plan(_broken(tmp_path, "{"), "cpu-int4")
    with pytest.raises(SourceError, match=r"expected a JSON object, got list"):
        qcompile.plan(_broken(tmp_path, "[]"), "cpu-int4")
    with pytest.raises(SourceError, match=r"expected the model_type of a family that transformers has, got None"):
        qcompile.plan(_broken(tmp_path, '{"hidden_size": 8}'), "cpu-int4")
    with pytest.raises(SourceError, match=r"config.json: expected settings of a LlamaConfig, got"):
        qcompile.plan(_broken(tmp_path, '{"model_type": "llama", "hidden_size": "wide"}'), "cpu-int4")
    with pytest.raises(
        SourceError, match=r"nowhere.json: expected a Hugging Face directory, a config.json, .* got a path that does not exist"
    ):
        qcompile.plan(tmp_path / "nowhere.json", "cpu-int4")
    with pytest.raises(SourceError, match=r"expected a Hugging Face directory, a .gguf .* got another file"):
        qcompile.compile(config, "cpu-int4")
    mamba = transformers.MambaConfig(num_hidden_layers=1, hidden_size=8)
    mamba.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="a state that is no key/value cache"):
        qcompile.plan(tmp_path / "config.json", "cpu-int4")
