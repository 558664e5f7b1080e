"""Hugging Face directories and modules: lazy weights, text assets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qcompile.errors import SourceError, UnboundConstantError, UnsupportedModelError
from qcompile.frontend import load
from qcompile.frontend.checkpoint import initialized_buffers
from qcompile.frontend.huggingface import skeleton
from tests.models import example_inputs, tiny


def _same(graph: Any, model: nn.Module, family: str) -> None:
    inputs = example_inputs(family, batch=3, size=9, seed=7)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert float((graph(**inputs)["logits"] - expected).abs().max() / expected.abs().max()) <= 1e-5


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sharded_checkpoint_is_read_lazily(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    graph = load(tmp_path).graph
    _same(graph, model, "llama")
    assert {constant.key.split(":")[1] for constant in graph.constants.values() if "safetensors" in constant.key} > {
        "model-00001-of-00004.safetensors"
    }


def test_a_half_precision_checkpoint_is_cast(tmp_path: Path) -> None:
    model = tiny("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    graph = load(tmp_path).graph
    assert graph.constants["model.layers.0.mlp.up_proj.weight"].key.endswith("model.layers.0.mlp.up_proj.weight|cast(fp32)")
    exact = tiny("qwen2")
    exact.load_state_dict(model.float().state_dict())
    _same(graph, exact, "qwen2")


@pytest.mark.parametrize(("family", "experts"), [("mixtral", "block_sparse_moe.experts.0.w1"), ("qwen2_moe", "mlp.experts.0.gate_proj")])
def test_experts_stored_one_by_one_are_merged_lazily(family: str, experts: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    assert any(experts in name for name in load_file(tmp_path / "model.safetensors"))
    graph = load(tmp_path).graph
    _same(graph, model, family)
    key = graph.constants["model.layers.0.mlp.experts.gate_up_proj"].key
    assert key.startswith("concatenate1(stack0(safetensors:")
    assert key.count("safetensors:model.safetensors:") == 8


def test_experts_stored_together_are_taken_as_they_are(tmp_path: Path) -> None:
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    save_file({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    _same(load(tmp_path).graph, model, "mixtral")


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_checkpoint_of_the_base_model_or_of_the_whole(prefixed: bool, tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.config.save_pretrained(tmp_path)
    weights = {
        name.removeprefix("" if prefixed else "transformer."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lm_head" not in name
    }
    save_file(weights, tmp_path / "model.safetensors")
    _same(load(tmp_path).graph, model, "gpt2")


def test_a_configuration_alone_gives_unbound_constants(tmp_path: Path) -> None:
    tiny("gemma3").config.save_pretrained(tmp_path)
    _edit(tmp_path, architectures=["Gemma3ForCausalLM"])
    graph = load(tmp_path).graph
    unbound = [name for name, constant in graph.constants.items() if not constant.is_bound]
    assert "model.layers.1.mlp.up_proj.weight" in unbound
    assert not any("inv_freq" in name or "embed_scale" in name for name in unbound)
    with pytest.raises(
        UnboundConstantError, match=r"q_proj.weight: expected a value, got none: the model was traced from its configuration alone"
    ):
        graph(**example_inputs("gemma3"))


def test_a_large_configuration_is_traced_without_its_weights(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    graph = load(tmp_path).graph
    assert graph.constants["model.layers.1.mlp.down_proj.weight"].shape == (8192, 28672)
    assert sum(constant.nbytes for constant in graph.constants.values()) > 10e9
    assert len(graph.calls(torch.ops.qcompile.attention.default)) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox", "bert"])
def test_buffers_outside_of_checkpoints_are_initialized_exactly(family: str) -> None:
    model = tiny(family)
    persistent = model.state_dict()
    expected = {name: value for name, value in model.named_buffers() if name not in persistent}
    found = initialized_buffers(skeleton(model.config), list(expected))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_weight_missing_from_the_checkpoint(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UnboundConstantError, match=r"model.layers.1.mlp.up_proj.weight: expected a value in the checkpoint, got none"):
        load(tmp_path)


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    _edit(tmp_path, intermediate_size=64)
    with pytest.raises(SourceError, match=r"mlp.*: expected shape \(.*64.*\), got \(.*48.*\); the weights belong to another configuration"):
        load(tmp_path)


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model.safetensors: expected a whole safetensors file, got"):
        load(tmp_path)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(
        SourceError, match=r"model-00002-of-00004.safetensors: expected the file that the checkpoint's index names, got none"
    ):
        load(tmp_path)


def test_a_shard_outside_of_the_directory(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    tiny("llama").save_pretrained(inside)
    (inside / "model.safetensors").rename(tmp_path / "model.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(SourceError, match=r"expected names of files in the model's directory, got the path '../model.safetensors'"):
        load(inside)


def test_pickles_are_refused(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(SourceError, match=r"pytorch_model.bin: expected \*.safetensors, got a pickle, which can run code"):
        load(tmp_path)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config.json: expected a Hugging Face model directory with a config.json, got none"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config.json: expected JSON, got"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match=r"config.json: expected a JSON object, got list"):
        load(tmp_path)


def test_code_of_its_own_is_never_run_unasked(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    _edit(tmp_path, model_type="exotic", auto_map={"AutoConfig": "configuration_exotic.ExoticConfig"})
    (tmp_path / "configuration_exotic.py").write_text("raise RuntimeError('this code ran')")
    with pytest.raises(SourceError, match=r"got 'exotic', whose config.json brings its own code \(auto_map\); .* trust_remote_code=True"):
        load(tmp_path)


def test_a_family_that_transformers_does_not_have(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    _edit(tmp_path, model_type="exotic")
    with pytest.raises(SourceError, match=r"expected the model_type of a family that transformers has, got 'exotic'"):
        load(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "anything-else"])
def test_quantized_checkpoints_are_refused_by_name(method: str, tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    _edit(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=rf"got a checkpoint quantized by {method}; give the original model"):
        load(tmp_path)
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(UnsupportedModelError, match=rf"LlamaForCausalLM: .* quantized by {method}"):
        load(model)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("FalconConfig", {"alibi": True}, r"falcon: .* got attention with ALiBi biases"),
        ("MambaConfig", {}, r"mamba: .* got a state that is no key/value cache"),
        ("Mamba2Config", {}, r"mamba2: .* got a state that is no key/value cache"),
        ("T5Config", {}, r"t5: .* got an encoder-decoder"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"llama: .* positions of type dynamic",
        ),
    ],
)
def test_families_that_are_not_served_are_named(name: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    getattr(transformers, name)(**options).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason + ".*not served yet"):
        load(tmp_path)


def test_a_forward_without_positions_is_refused() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100)
    with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM: expected a forward that takes position_ids"):
        load(transformers.BloomForCausalLM(config))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("mixtral").train()
    before = dict(vars(model.config))
    load(model)
    assert vars(model.config) == before
    assert model.training
    assert "forward" not in vars(model)


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match=r"nobody/nothing: expected a local directory, a .gguf file or a model of the hub, got none of them"
    ):
        load("nobody/nothing")


def test_text_assets(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer = {"added_tokens": [{"id": 5, "content": "</s>"}], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    found = load(tmp_path).assets
    assert set(found.files) == {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert found.files["chat_template.jinja"] == b"{{ messages }}"
    assert found.eos_token_ids == (2, 7, 5)
    assert (found.max_positions, found.vocab_size, found.model_type, found.name) == (128, 100, "llama", tmp_path.name)
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert load(tmp_path).assets.files["chat_template.jinja"] == b"newer"


def test_a_module_remembers_where_its_tokenizer_is(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert load(model).assets.files["tokenizer.json"] == b"{}"


def test_a_hybrid_is_a_module_because_a_cache_is_not_all_of_its_state() -> None:
    config = transformers.Lfm2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config).eval()
    graph = load(model).graph
    assert graph.interface.kind == "module"
    _same(graph, model, "llama")


def test_other_inputs_of_a_causal_model_make_it_a_module() -> None:
    inputs = {"input_ids": torch.arange(10).view(2, 5) + 3, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    graph = load(tiny("llama"), example_inputs=inputs).graph
    assert graph.interface.kind == "module"
    assert set(graph.interface.symbols.values()) == {"batch", "sequence"}
    assert set(graph(**inputs)) == {"logits"}
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: expected a full, causal .* not served yet; pass an attention_mask"):
        load(tiny("llama"), example_inputs={"input_ids": inputs["input_ids"]})
