"""What onnxruntime-genai wants beside a model: its configuration and the tokenizer."""

from __future__ import annotations

import json
from typing import Any

from qcompile.errors import ExportError
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets

_ALIKE = {name: name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")}
"""Model types that the library knows; any other decoder is run like a llama."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def genai_files(graph: Graph, assets: Assets, model: str, max_context: int) -> dict[str, bytes]:
    """File name -> content.

    Raises:
        ExportError: for a model without a cache, a cache whose tensors the library does not name, or no tokenizer.
    """
    if graph.interface.kind != "cached_lm":
        raise ExportError("export_onnx: genai=True: expected a causal language model, got another module; leave genai out")
    if "tokenizer.json" not in assets.files:
        raise ExportError("export_onnx: genai=True: expected a model with a tokenizer.json, got none; compile a directory that has one")
    config = json.dumps(_config(graph, assets, model, max_context), indent=2).encode()
    return {"genai_config.json": config, **{name: assets.files[name] for name in _TOKENIZER if name in assets.files}}


def _config(graph: Graph, assets: Assets, model: str, max_context: int) -> dict[str, Any]:
    attends = [node for node in graph.fx.nodes if "cache_attend" in str(node.target)]
    if not attends or any(node.target.__name__ != "cache_attend.default" for node in attends):
        raise ExportError(
            "export_onnx: genai=True: expected a cache of numbers, got one with scales; compile with kv16 or without a cache format"
        )
    query = attends[0].args[0].meta["val"]
    states = graph.states
    heads, size = int(states[0].meta["val"].shape[1]), int(states[0].meta["val"].shape[3])
    ends = list(assets.eos_token_ids)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": model, "head_size": size, "hidden_size": int(query.shape[1]) * size, "num_attention_heads": int(query.shape[1]),
        "num_hidden_layers": len(attends), "num_key_value_heads": heads,
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }  # fmt: skip
    tokens = {"bos_token_id": ends[0] if ends else 0, "eos_token_id": ends, "pad_token_id": ends[0] if ends else 0}
    kind = _ALIKE.get(assets.model_type or "", "llama")
    return {
        "model": {**tokens, "context_length": max_context, "decoder": decoder, "type": kind, "vocab_size": assets.vocab_size},
        "search": {"do_sample": False, "max_length": max_context, "past_present_share_buffer": False},
    }
