"""Hugging Face models: a module in memory, a local directory, or a name on the hub with a revision."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, fx
from torch.export import Dim
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qcompile.errors import SourceError, UnsupportedModelError
from qcompile.frontend import assets, checkpoint
from qcompile.frontend.capture import capture_module, stand_in
from qcompile.frontend.convert import Binder
from qcompile.frontend.loaded import Loaded
from qcompile.frontend.transformers_hooks import tracing
from qcompile.ir.constants import Constant, Source
from qcompile.ir.graph import Graph, fake_value

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default, _aten.view.default, _aten.reshape.default)
_HUB_WEIGHTS = "*.safetensors"
_HUB_FILES = ("*.json", _HUB_WEIGHTS, "*.jinja", "*.txt", "tokenizer.model", "spiece.model", "*.py")


def load_model(model: PreTrainedModel, example_inputs: Any = None, dynamic_shapes: Any = None) -> Loaded:
    """A model in memory; its tokenizer comes along if it was loaded from a local directory that is still there."""
    refuse(model.config, type(model).__name__)
    origin = Path(model.config.name_or_path or "/dev/null")
    name = type(model).__name__
    graph = trace(model, name, None, example_inputs, dynamic_shapes)
    found = (
        assets.from_directory(origin, model.config, name) if (origin / "config.json").is_file() else assets.configured(model.config, name)
    )
    if getattr(model, "generation_config", None) is not None:
        ids = assets.as_ids(model.generation_config.eos_token_id)
        found.eos_token_ids = tuple(dict.fromkeys((*found.eos_token_ids, *ids)))
        found.files.setdefault("generation_config.json", model.generation_config.to_json_string().encode())
    return Loaded(graph, found)


def load_hub(
    name: str, revision: str | None, trust_remote_code: bool, example_inputs: Any = None, dynamic_shapes: Any = None, *,
    weights: bool = True,
) -> Loaded:  # fmt: skip
    """A model of the hub at a revision, downloaded once into the hub's own cache; without `weights` only what is beside them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [pattern for pattern in _HUB_FILES if weights or pattern != _HUB_WEIGHTS]
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{name}: expected a local directory, a .gguf file or a model of the hub, got none of them: {first}") from error
    loaded = load_directory(directory, trust_remote_code, example_inputs, dynamic_shapes, weights=weights)
    loaded.assets.name = name
    return loaded


def load_directory(
    directory: Path, trust_remote_code: bool = False, example_inputs: Any = None, dynamic_shapes: Any = None, *, weights: bool = True
) -> Loaded:
    """A directory with config.json and *.safetensors: traced without weights, which are bound lazily.

    Without any weight file, or without `weights`, every parameter is left unbound, which is enough to plan.

    Raises:
        UnsupportedModelError: for a family, a quantized checkpoint or an attention that is not served.
        SourceError: for a directory that is damaged, or needs code of its own and was not trusted to run it.
    """
    config = _read_config(directory / "config.json", trust_remote_code)
    model = skeleton(config, trust_remote_code)
    sources = checkpoint.for_model(checkpoint.open_checkpoint(directory), model) if weights else {}
    graph = trace_unloaded(model, directory.name, sources, example_inputs, dynamic_shapes)
    return Loaded(graph, assets.from_directory(directory, config, directory.name))


def load_config(path: Path, trust_remote_code: bool = False, example_inputs: Any = None, dynamic_shapes: Any = None) -> Loaded:
    """A configuration alone, of any file name: every parameter is unbound; there is no tokenizer, whatever lies beside it.

    Raises:
        UnsupportedModelError: for a family, a quantized checkpoint or an attention that is not served.
        SourceError: for a file that is no configuration of a family that transformers has.
    """
    config = _read_config(path, trust_remote_code)
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    graph = trace_unloaded(skeleton(config, trust_remote_code), name, {}, example_inputs, dynamic_shapes)
    return Loaded(graph, assets.configured(config, name))


def _read_config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in a file, of a model that can be served."""
    where = path.parent if path.name == "config.json" else path
    parsed = checkpoint.config_json(path)
    _refuse_code(parsed, where, trust_remote_code)
    _refuse_quantized(parsed.get("quantization_config"), str(where))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    # Settings are checked by each family in its own way.
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        family = type(transformers.CONFIG_MAPPING[parsed["model_type"]]()).__name__ if parsed.get("model_type") else "model"
        first = " ".join(str(error).split())
        raise SourceError(f"{path}: expected settings of a {family}, got {first}; mend config.json") from error
    refuse(config, str(where))
    return config


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on `meta`, in float32 and evaluation mode."""
    architecture = next(iter(config.architectures or ()), "")
    known = getattr(transformers, architecture, None)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        if known is not None:
            model = known._from_config(config, dtype=torch.float32)
        elif "ForCausalLM" in architecture or (not architecture and _is_decoder(config)):
            model = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
        else:
            model = AutoModel.from_config(config, **options)  # type: ignore[no-untyped-call]
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _is_decoder(config: PreTrainedConfig) -> bool:
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def refuse(config: PreTrainedConfig, name: str) -> None:
    """Name what cannot be served, before any work is done."""
    _refuse_quantized(getattr(config, "quantization_config", None), name)
    text = config.get_text_config()
    reason = ""
    if config.is_encoder_decoder:
        reason = "an encoder-decoder"
    elif getattr(text, "alibi", False):
        reason = "attention with ALiBi biases"
    elif "mamba" in text.model_type or text.model_type in ("rwkv", "recurrent_gemma", "jamba"):
        reason = "a state that is no key/value cache"
    elif "deepseek" in text.model_type:
        reason = "latent attention"
    else:
        kinds = {str(item.get("rope_type")) for item in _rope_settings(text)} & {"dynamic", "longrope"}
        reason = f"rotary positions of type {', '.join(kinds)}, whose frequencies depend on the length" if kinds else ""
    if reason:
        raise UnsupportedModelError(
            f"{name}: {text.model_type}: expected a decoder or an encoder with plain attention, got {reason}; not served yet"
        )


def _rope_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [item for item in settings.values() if isinstance(item, dict)]
    return nested or [settings]


def _refuse_quantized(settings: Any, name: str) -> None:
    if settings:
        found = settings if isinstance(settings, dict) else settings.to_dict()
        method = getattr(found.get("quant_method"), "value", found.get("quant_method"))
        raise UnsupportedModelError(
            f"{name}: expected weights in bf16, fp16 or fp32, got a checkpoint quantized by {method}; give the original model"
        )


def _refuse_code(parsed: Mapping[str, Any], directory: Path, trusted: bool) -> None:
    model_type = parsed.get("model_type")
    if parsed.get("auto_map") and not trusted and model_type not in transformers.CONFIG_MAPPING:
        raise SourceError(
            f"{directory}: expected a family that transformers has, got {model_type!r}, whose config.json brings its own code (auto_map); "
            "read that code, then pass trust_remote_code=True"
        )
    if not parsed.get("auto_map") and model_type not in transformers.CONFIG_MAPPING:
        raise SourceError(f"{directory}: expected the model_type of a family that transformers has, got {model_type!r}")


def trace_unloaded(
    model: PreTrainedModel, name: str, sources: Mapping[str, Source | Constant], example_inputs: Any = None, dynamic_shapes: Any = None
) -> Graph:
    """The graph of a model on `meta`, its constants bound to `sources`.

    A forward that indexes with a list of numbers (falcon's) loses them on `meta`: such a model is traced with weights on the CPU
    that are never touched.
    """
    try:
        return trace(model, name, checkpoint.binder(model, sources, name), example_inputs, dynamic_shapes)
    except checkpoint.LostConstantError:
        stand_in(model)
        return trace(model, name, checkpoint.binder(model, sources, name), example_inputs, dynamic_shapes)


def trace(model: PreTrainedModel, name: str, bind: Binder | None, example_inputs: Any = None, dynamic_shapes: Any = None) -> Graph:
    """The graph of a model: a causal one from `input_ids`, `attention_mask`, `position_ids` to logits, any other from its own inputs."""
    causal = example_inputs is None and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    inputs = _causal_inputs(model, name) if causal else example_inputs if example_inputs is not None else _main_input(model, name)
    if dynamic_shapes is None and isinstance(inputs, Mapping):
        dynamic_shapes = _shapes(inputs, 0 if causal else int(getattr(model.config, "max_position_embeddings", 0) or 0))
    with _logits_only(model) if causal else contextlib.nullcontext(), tracing(model, name):
        graph = capture_module(model, inputs, dynamic_shapes, name=name, bind=bind)
    for node in graph.calls(torch.ops.qcompile.attention.default):
        _simplify_padding(node)
    graph.remove_dead()
    if causal and _is_causal_throughout(graph, model):
        graph.interface.kind = "causal_lm"
        _pad_examples(graph.interface.examples)
    return graph


def _is_causal_throughout(graph: Graph, model: PreTrainedModel) -> bool:
    """Whether a key/value cache holds all that a token needs of earlier ones: a hybrid's convolutions or recurrences are no attention."""
    causal = [bool(node.args[6]) for node in graph.calls(torch.ops.qcompile.attention.default)]
    return all(causal) and len(causal) == getattr(model.config.get_text_config(), "num_hidden_layers", 0)


def _causal_inputs(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name}: {type(model).__name__}: expected a forward that takes position_ids, got one that derives positions by itself; "
            "not served yet"
        )
    ids = (torch.arange(16).view(2, 8) * 7 + 3) % int(model.config.get_text_config().vocab_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8).repeat(2, 1)}


def _main_input(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    main = model.main_input_name
    if main == "input_ids":
        ids = (torch.arange(16).view(2, 8) * 7 + 3) % int(model.config.vocab_size)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if main == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))}
    raise UnsupportedModelError(f"{name}: expected a model of text or images, got one of {main}; pass example_inputs")


def _shapes(inputs: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The batch of every tensor, and the sequence of tokens and masks up to the longest that a table of positions allows (0: any)."""
    batch = Dim("batch", min=1)
    sequence = Dim("sequence", min=1, max=longest) if longest else Dim("sequence", min=1)

    def spec(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        tokens = value.dim() == 2 and value.dtype in (torch.int64, torch.int32, torch.bool)
        return {0: batch, 1: sequence} if tokens else {0: batch}

    return {name: spec(value) for name, value in inputs.items()}


@contextlib.contextmanager
def _logits_only(model: PreTrainedModel) -> Iterator[None]:
    """Let the model take the three inputs of a causal language model and return its logits alone, for one trace."""

    def forward(self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return {"logits": type(self).forward(self, **inputs, use_cache=False, return_dict=True).logits}

    vars(model)["forward"] = MethodType(forward, model)  # a method, because a copy of the model must get a copy of it
    try:
        yield
    finally:
        del vars(model)["forward"]


def _simplify_padding(node: fx.Node) -> None:
    """Let an attention read the mask placeholder [B, T] itself: nonzero means the same before and after a cast."""
    mask = node.args[3]
    while isinstance(mask, fx.Node) and mask.target in _CASTS:
        before = mask.args[0]
        if not isinstance(before, fx.Node) or fake_value(before).shape != fake_value(mask).shape:
            break
        mask = before
    node.update_arg(3, mask)


def _pad_examples(examples: dict[str, Tensor]) -> None:
    """Put padding before the first row, so that a pass that loses the mask is found by the numeric check."""
    mask = torch.ones_like(examples["attention_mask"])
    mask[0, : mask.shape[1] // 3] = 0
    examples["attention_mask"] = mask
    examples["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
