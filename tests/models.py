"""Tiny random models of every listed family: two layers, seeded, a few hundred thousand parameters, built in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

CAUSAL_FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "mixtral", "qwen2_moe",
)  # fmt: skip
OTHER_FAMILIES = ("bert", "vit", "resnet")

VOCABULARY = 100
_HEADS = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
_GROUPED = _HEADS | {"num_key_value_heads": 2, "intermediate_size": 48}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def _config(family: str) -> transformers.PretrainedConfig:
    """The configuration of `family`: every feature that tells it from a plain llama is switched on."""
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", _GROUPED),
        "qwen2": ("Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
        "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}),
        "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 5}),
        "gemma2": ("Gemma2Config", _GROUPED | _WINDOW | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}),
        "gemma3": ("Gemma3TextConfig", _GROUPED | _WINDOW),
        "phi3": ("Phi3Config", _GROUPED | {"sliding_window": None}),
        "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}),
        "opt": ("OPTConfig", _HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        "gpt_neox": ("GPTNeoXConfig", _HEADS | {"intermediate_size": 64, "rotary_pct": 0.5}),
        "falcon": ("FalconConfig", _HEADS | {"alibi": False, "multi_query": True, "new_decoder_architecture": False, "bias": True}),
        "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "qwen2_moe": (
            "Qwen2MoeConfig",
            _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        ),
        "bert": ("BertConfig", _HEADS | {"intermediate_size": 64}),
        "vit": (
            "ViTConfig",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            | {"image_size": 32, "patch_size": 8},
        ),
        "resnet": ("ResNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}),
    }  # fmt: skip
    name, options = made[family]
    extra = _TOKENS if family not in ("vit", "resnet") else {}
    config: transformers.PretrainedConfig = getattr(transformers, name)(**options, **extra)
    return config


def tiny(family: str, **options: Any) -> nn.Module:
    """A seeded model of `family` in float32 and evaluation mode; `options` replace settings of its configuration.

    Weights are drawn wider than the families' own initialization, and gains and biases are not 1 and 0, so that a mistake shows.
    """
    config = _config(family)
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    if family in CAUSAL_FAMILIES:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.float().eval()


def example_inputs(family: str, batch: int = 2, size: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Keyword inputs of `tiny(family)`: `size` is the sequence length of text; images are 32 x 32 whatever it is.

    Causal families: `input_ids`, `attention_mask` (all ones) and `position_ids`, int64 [batch, size]. bert: the first two.
    """
    generator = torch.Generator().manual_seed(seed)
    if family in ("vit", "resnet"):
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    inputs = {
        "input_ids": torch.randint(3, VOCABULARY, (batch, size), generator=generator),
        "attention_mask": torch.ones(batch, size, dtype=torch.long),
    }
    if family in CAUSAL_FAMILIES:
        inputs["position_ids"] = torch.arange(size).repeat(batch, 1)
    return inputs
