"""GGUF files: the real model against transformers' own reading, tiny files of every architecture, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import qcompile
from qcompile.errors import SourceError, UnsupportedModelError
from qcompile.frontend import Loaded, load
from qcompile.frontend.gguf import GgufSource
from qcompile.quant.format import parse_format
from qcompile.quant.reference import Quantized, restore
from tests.models import example_inputs, tiny

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")
_DIVISORS = np.array([1.0, 1.0, 4.0, 8.0], dtype=np.float32)
_LAYER_NORM = "attention.layer_norm_rms_epsilon"


def _permuted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Queries and keys as llama.cpp's converter stores them for llama: the two rows of a plane side by side."""
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _write(path: Path, architecture: str, model: nn.Module, *, extra: str = "", quantized: str = "", **fields: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    blocks = gguf.GGMLQuantizationType[quantized] if quantized else None
    names = {
        "context_length": 128,
        "block_count": 2,
        "feed_forward_length": config.intermediate_size,
        "embedding_length": config.hidden_size,
    }
    names |= {"attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads}
    for name, value in names.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.{_LAYER_NORM}", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
            f"{architecture}.{name.replace('__', '.')}", value
        )
    mapping = gguf.get_tensor_name_map(next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), 2)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        stored = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if tied and name == "lm_head.weight":
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = _permuted(name, tensor, config)
        data = (tensor + 1 if architecture == "gemma2" and "norm" in name else tensor).numpy()
        kind = blocks if data.ndim == 2 and data.shape[1] % 32 == 0 else None
        writer.add_tensor(stored, data if kind is None else gguf.quants.quantize(data, kind), raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, _DIVISORS)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fields(architecture: str, model: nn.Module) -> dict[str, Any]:
    config = model.config
    fields: dict[str, Any] = {"attention__key_length": config.head_dim} if architecture in ("qwen3", "gemma2") else {}
    if architecture == "gemma2":
        fields |= {"attention__sliding_window": config.sliding_window, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    return fields


def _model(architecture: str) -> nn.Module:
    # gemma2 files do not say how queries are scaled: by the head size, but for the 27B model.
    return tiny(architecture, query_pre_attn_scalar=256) if architecture == "gemma2" else tiny(architecture)


@pytest.mark.filterwarnings("ignore:.*tokenizer could not be converted")
@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_a_file_gives_the_model_it_was_made_from(architecture: str, tmp_path: Path) -> None:
    model = _model(architecture)
    _write(tmp_path / "model.gguf", architecture, model, **_fields(architecture, model))
    loaded = load(tmp_path / "model.gguf")
    inputs = example_inputs(architecture, batch=3, size=9, seed=8)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert float((loaded.graph(**inputs)["logits"] - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert loaded.graph.interface.kind == "causal_lm"
    assert loaded.assets.vocab_size == 100


@pytest.mark.filterwarnings("ignore:.*tokenizer could not be converted")
def test_quantized_blocks_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    model = tiny("llama")
    _write(tmp_path / "model.gguf", "llama", model, quantized="Q8_0")
    constant = load(tmp_path / "model.gguf").graph.constants["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(constant.source, GgufSource)
    assert constant.source.nbytes == 48 * 34
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    step = weight.view(48, 1, 32).abs().amax(-1, keepdim=True) / 127
    # Half a step of rounding, and the scale itself in half precision.
    assert bool(((constant.materialize() - weight).view(48, 1, 32).abs() <= step * (0.5 + 127 * 2**-11) + 1e-7).all())


@pytest.mark.filterwarnings("ignore:.*tokenizer could not be converted")
@pytest.mark.parametrize(("blocks", "form"), [
    ("Q4_1", "int4 g32 min fp16"), ("Q5_1", "int5 g32 min fp16"), ("Q4_0", "int4 g32 sym fp16"), ("Q8_0", "int8 g32 sym fp16"),
])  # fmt: skip
def test_blocks_keep_their_values_in_the_format_that_has_them(blocks: str, form: str, tmp_path: Path) -> None:
    """Rounded to nearest: the file's own numbers, to the last bit; a wider block uses both its ends less often than one of 4 bits."""
    model = tiny("llama")
    _write(tmp_path / "model.gguf", "llama", model, quantized=blocks)
    loaded = load(tmp_path / "model.gguf")
    weights = {name: constant for name, constant in loaded.graph.constants.items() if "proj" in name and constant.shape[1] % 32 == 0}
    assert len(weights) == 12
    compiled = qcompile.compile(tmp_path / "model.gguf", "cpu-int4", weight_format=form, recipe="nearest")
    for name, constant in weights.items():
        parts = {part: compiled.graph.constants[f"{name}.{part}"].materialize() for part in parse_format(form).parts}
        kept = restore(Quantized(parts["codes"], parts["scale"], parts.get("zero")), parse_format(form), constant.shape[1])
        assert torch.equal(kept, constant.materialize())


@pytest.mark.filterwarnings("ignore:.*tokenizer could not be converted")
def test_divisors_of_rotary_frequencies_are_honoured(tmp_path: Path) -> None:
    model = tiny("llama")
    _write(tmp_path / "model.gguf", "llama", model, extra="rope_freqs.weight")
    found = load(tmp_path / "model.gguf").graph.constants["model.rotary_emb.inv_freq"].materialize()
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq / torch.from_numpy(_DIVISORS), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*tokenizer could not be converted")
def test_linear_scaling_of_positions(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", "llama", tiny("llama"), rope__scaling__type="linear", rope__scaling__factor=4.0)
    found = load(tmp_path / "model.gguf").graph.constants["model.rotary_emb.inv_freq"].materialize()
    torch.testing.assert_close(found, tiny("llama").model.rotary_emb.inv_freq / 4, rtol=1e-6, atol=0)


def test_other_positions_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "yarn.gguf", "llama", tiny("llama"), rope__scaling__type="yarn")
    with pytest.raises(UnsupportedModelError, match=r"yarn.gguf: expected plain or linearly scaled rotary positions, got scaling 'yarn'"):
        load(tmp_path / "yarn.gguf")
    _write(tmp_path / "part.gguf", "llama", tiny("llama"), rope__dimension_count=4)
    with pytest.raises(UnsupportedModelError, match=r"part.gguf: .* got 4 of 8 dimensions rotated"):
        load(tmp_path / "part.gguf")


def test_a_tensor_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", "llama", tiny("llama"), extra="blk.0.attn_k_norm.weight")
    with pytest.raises(SourceError, match=r"expected the tensors of a llama model, got also blk.0.attn_k_norm.weight; pass the original"):
        load(tmp_path / "model.gguf")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "exotic")
    writer.add_tensor("token_embd.weight", _DIVISORS)
    _finish(writer)
    with pytest.raises(SourceError, match=r"model.gguf: expected a GGUF architecture among \['gemma2', .*\], got 'exotic'"):
        load(tmp_path / "model.gguf")


def test_a_file_without_its_embedding(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output.weight", _DIVISORS)
    _finish(writer)
    with pytest.raises(SourceError, match=r"expected a tensor token_embd.weight, got none"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [3, 200, 0.5, 0.99])
def test_a_truncated_file(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    _write(path, "llama", tiny("llama"))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else len(content) * kept)])
    with pytest.raises(SourceError, match=r"model.gguf: expected a whole GGUF file"):
        load(path)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Loaded:
    return load(smollm2_gguf)


def test_smollm2_computes_what_transformers_computes(smollm2: Loaded, smollm2_gguf: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    ids = torch.tensor([[504, 3575, 282, 4649, 314], [1, 9690, 198, 2683, 359]])
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    found = smollm2.graph(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5).repeat(2, 1))["logits"]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-3


def test_smollm2_brings_its_text_assets(smollm2: Loaded) -> None:
    found = smollm2.assets
    assert set(found.files) >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"}
    assert found.eos_token_ids == (2,)
    assert (found.max_positions, found.vocab_size, found.model_type) == (8192, 49152, "llama")
    assert json.loads(found.files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"
    assert b"<|im_start|>" in found.files["chat_template.jinja"]


def test_smollm2_is_one_attention_per_layer_over_lazy_tensors(smollm2: Loaded) -> None:
    graph = smollm2.graph
    assert len(graph.calls(torch.ops.qcompile.attention.default)) == 30
    lazy = [constant for constant in graph.constants.values() if isinstance(constant.source, GgufSource)]
    assert len(lazy) == 272
    assert "permute(0, 2, 1, 3)" in graph.constants["model.layers.7.self_attn.k_proj.weight"].key
