"""GGUF files: memory-mapped, one tensor dequantized at a time, names and settings as the family's own model has them."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from qcompile.errors import SourceError, UnsupportedModelError
from qcompile.frontend import assets, huggingface
from qcompile.frontend.loaded import Loaded
from qcompile.ir.constants import Constant, Permute, Reshape, Source, tensor_constant
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets

# Architecture -> model_type; Mistral's files call themselves llama.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
# Metadata key without the architecture -> setting of the configuration.
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
_GEMMA2_27B_LAYERS = 46


@dataclass(frozen=True)
class GgufSource:
    """One tensor of a GGUF file, mapped and not read until asked for; dequantized to float32.

    `offset` and `nbytes` say where its blocks are in the file, `rows` the shape of the blocks as the file counts them.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Always float32: what dequantization gives."""
        return torch.float32

    @property
    def key(self) -> str:
        """File and name."""
        return f"gguf:{self.path.name}:{self.name}"

    def load(self) -> Tensor:
        """Read and dequantize this one tensor."""
        raw = np.fromfile(self.path, dtype=np.uint8, count=self.nbytes, offset=self.offset)
        kind = gguf.GGMLQuantizationType(self.kind)
        if kind == gguf.GGMLQuantizationType.F32:
            return torch.from_numpy(raw.view(np.float32)).reshape(self.shape)
        rows = raw.view(np.float16) if kind == gguf.GGMLQuantizationType.F16 else raw
        return torch.from_numpy(gguf.quants.dequantize(rows.reshape(*self.shape[:-1], -1), kind).astype(np.float32)).reshape(self.shape)


@dataclass(frozen=True)
class Shift:
    """Add a number to every element."""

    by: float

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Unchanged."""
        return dtype

    def apply(self, tensor: Tensor) -> Tensor:
        """The sum."""
        return tensor + self.by

    def __str__(self) -> str:
        return f"shift({self.by:+g})"


def load_gguf(path: Path) -> Loaded:
    """A `.gguf` file of a llama, mistral, qwen2, qwen3 or gemma2 model.

    Raises:
        SourceError: for a file that is missing, truncated, of an unknown architecture, or with tensors that the architecture does not have.
        UnsupportedModelError: for positions that are scaled in a way that is not served.
    """
    reader = _open(path)
    config = _config(reader, path)
    model = huggingface.skeleton(config)
    sources = _sources(reader, model, path)
    graph = huggingface.trace_unloaded(model, path.name, sources)
    if any(tensor.name == _ROPE_FREQUENCIES for tensor in reader.tensors):
        _divide_frequencies(graph, reader, path)
    return Loaded(graph, _assets(reader, config, path))


def _open(path: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: expected a GGUF file, got none") from error
    # The reader trusts the file, so that a damaged one fails wherever its numbers lead to.
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise SourceError(
            f"{path}: expected a whole GGUF file, got one that is truncated or damaged ({error}); download it again"
        ) from error
    end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    if end > path.stat().st_size:
        raise SourceError(f"{path}: expected a whole GGUF file of {end} bytes, got {path.stat().st_size}; download it again")
    return reader


def _field(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _config(reader: gguf.GGUFReader, path: Path) -> PreTrainedConfig:
    architecture = str(_field(reader, "general.architecture", ""))
    if architecture not in _FAMILIES:
        raise SourceError(
            f"{path}: expected a GGUF architecture among {sorted(_FAMILIES)}, got {architecture!r}; pass the original Hugging Face model"
        )
    values = {setting: _field(reader, f"{architecture}.{key}") for key, setting in _SETTINGS.items()}
    values = {setting: value for setting, value in values.items() if value is not None}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise SourceError(f"{path}: expected a tensor token_embd.weight, got none; download it again")
    values["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values["rope_parameters"] = _rope(reader, architecture, values["head_dim"], path)
    for name in ("bos", "eos", "pad"):
        values[f"{name}_token_id"] = _field(reader, f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id")
    if architecture == "gemma2" and values["num_hidden_layers"] == _GEMMA2_27B_LAYERS:
        values["query_pre_attn_scalar"] = (
            values["hidden_size"] // values["num_attention_heads"]
        )  # the one size whose scale is not its head size
    return AutoConfig.for_model(_FAMILIES[architecture], architectures=None, **values)


def _rope(reader: gguf.GGUFReader, architecture: str, head_dim: int, path: Path) -> dict[str, Any]:
    kind = _field(reader, f"{architecture}.rope.scaling.type", "none")
    rotated = _field(reader, f"{architecture}.rope.dimension_count", head_dim)
    if kind not in ("none", "linear") or rotated != head_dim:
        got = f"scaling {kind!r}" if kind not in ("none", "linear") else f"{rotated} of {head_dim} dimensions rotated"
        raise UnsupportedModelError(
            f"{path}: expected plain or linearly scaled rotary positions, got {got}; pass the original Hugging Face model"
        )
    settings = {"rope_type": "default", "rope_theta": float(_field(reader, f"{architecture}.rope.freq_base", 10000.0))}
    return (
        settings
        if kind == "none"
        else settings | {"rope_type": "linear", "factor": float(_field(reader, f"{architecture}.rope.scaling.factor", 1.0))}
    )


def _sources(reader: gguf.GGUFReader, model: PreTrainedModel, path: Path) -> dict[str, Source | Constant]:
    architecture = str(_field(reader, "general.architecture"))
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {
        tensor.name: _constant(tensor, model.config, architecture, path) for tensor in reader.tensors if tensor.name != _ROPE_FREQUENCIES
    }
    found: dict[str, Source | Constant] = {}
    for name in model.state_dict():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in tensors:
            found[name] = tensors.pop(stored)
    if tensors:
        raise SourceError(
            f"{path}: expected the tensors of a {architecture} model, got also {', '.join(sorted(tensors)[:3])}; "
            "pass the original Hugging Face model"
        )
    return found


def _constant(tensor: gguf.ReaderTensor, config: PreTrainedConfig, architecture: str, path: Path) -> Constant:
    constant = Constant(_source(tensor, path))
    if architecture == "gemma2" and "norm" in tensor.name:
        return constant.then(Shift(-1.0))  # the file holds 1 + gain
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(tensor.name.split(".")[-2])
    return _unpermuted(constant, heads) if architecture == "llama" and heads else constant


def _source(tensor: gguf.ReaderTensor, path: Path) -> GgufSource:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    return GgufSource(path, tensor.name, shape, int(tensor.tensor_type), int(tensor.data_offset), int(tensor.n_bytes))


def _unpermuted(constant: Constant, heads: int) -> Constant:
    """Rows [H·D] of queries or keys in the order of halves: llama.cpp stores the two rows of a rotary plane side by side."""
    rows, *rest = constant.shape
    planes = rows // heads // 2
    order = (0, 2, 1, *range(3, 3 + len(rest)))
    return constant.then(Reshape((heads, planes, 2, *rest))).then(Permute(order)).then(Reshape((rows, *rest)))


def _divide_frequencies(graph: Graph, reader: gguf.GGUFReader, path: Path) -> None:
    """Llama 3.1 and later: the file holds a divisor for every rotary frequency."""
    divisors = _source(next(tensor for tensor in reader.tensors if tensor.name == _ROPE_FREQUENCIES), path).load()
    for name, constant in list(graph.constants.items()):
        if name.endswith("inv_freq"):
            graph.bind(name, tensor_constant(constant.materialize() / divisors))


def _assets(reader: gguf.GGUFReader, config: PreTrainedConfig, path: Path) -> Assets:
    found = assets.configured(config, path.stem)
    template = _field(reader, "tokenizer.chat_template")
    if template:
        found.files["chat_template.jinja"] = template.encode()
    found.files |= _tokenizer(path)
    tokens = _field(reader, "tokenizer.ggml.tokens") or []
    ends = [_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += [tokens.index(token) for token in assets.END_OF_TURN if token in tokens]
    found.eos_token_ids = tuple(dict.fromkeys(assets.as_ids(ends)))
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(found.eos_token_ids), "pad_token_id": config.pad_token_id}
    found.files["generation_config.json"] = json.dumps(generation).encode()
    return found


def _tokenizer(path: Path) -> dict[str, bytes]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # A tokenizer is optional, and its conversion fails in as many ways as there are vocabularies.
    except Exception as error:
        warnings.warn(f"{path}: the tokenizer could not be converted: {error}", stacklevel=2)
        return {}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    return {"tokenizer.json": tokenizer.backend_tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
