"""Safetensors checkpoints as lazy sources under the names that the model uses, and the buffers that no checkpoint holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, conversion_mapping, core_model_loading

from qcompile.errors import SourceError, UnboundConstantError, UnsupportedModelError
from qcompile.frontend.convert import Binder
from qcompile.ir.constants import Cast, Constant, SafetensorsSource, Source, UnboundSource, tensor_constant

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class MergedSource:
    """Several tensors as one: stacked along a new axis, or concatenated along an existing one."""

    parts: tuple[Source, ...]
    axis: int
    stacked: bool

    def _merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors), self.axis) if self.stacked else torch.cat(list(tensors), self.axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return tuple(self._merge([torch.empty(part.shape, device="meta") for part in self.parts]).shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first part."""
        return self.parts[0].dtype

    @property
    def key(self) -> str:
        """The parts' keys and how they are put together."""
        return f"{'stack' if self.stacked else 'concatenate'}{self.axis}({','.join(part.key for part in self.parts)})"

    def load(self) -> Tensor:
        """Read the parts and put them together."""
        return self._merge([part.load() for part in self.parts])


def open_checkpoint(directory: Path) -> dict[str, Source]:
    """Every tensor of a directory's safetensors files, none of them read; empty where there are no weights at all.

    Raises:
        SourceError: if a file is damaged or missing, or the weights are pickles.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise SourceError(
                f"{directory / pickles[0]}: expected *.safetensors, got a pickle, which can run code when it is read; "
                "convert it with save_pretrained"
            )
    sources: dict[str, Source] = {}
    for file in files:
        if Path(file).name != file:
            raise SourceError(f"{index}: expected names of files in the model's directory, got the path {file!r}; download the model again")
        sources |= _tensors(directory / file)
    return sources


def _tensors(path: Path) -> dict[str, Source]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (the handle is no mapping)
            return {
                name: SafetensorsSource(path, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()]) for name, part in slices.items()
            }
    except FileNotFoundError as error:
        raise SourceError(f"{path}: expected the file that the checkpoint's index names, got none; download the model again") from error
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: expected a whole safetensors file, got {error}; download the model again") from error
    except KeyError as error:
        raise SourceError(f"{path}: expected tensors in {sorted(_DTYPES)}, got {error}; give the model in bf16, fp16 or fp32") from error


def for_model(sources: Mapping[str, Source], model: PreTrainedModel) -> dict[str, Source]:
    """The same sources under the names of `model`'s parameters: renamed, and experts merged, as transformers does when it loads.

    Raises:
        UnsupportedModelError: if the family's checkpoints need another conversion.
    """
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, core_model_loading.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core_model_loading.WeightConverter)]
    wanted = model.state_dict()
    found: dict[str, Source] = {}
    collected: dict[str, dict[str, list[Source]]] = {}
    for name in sorted(sources, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if pattern is None:
            found[target] = sources[name]
        else:
            collected.setdefault(target, {}).setdefault(pattern, []).append(sources[name])
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for target, groups in collected.items():
        found[target] = _merged(target, groups, by_pattern[next(iter(groups))])
    return found


def _merged(target: str, groups: dict[str, list[Source]], converter: core_model_loading.WeightConverter) -> Source:
    values = {pattern: groups[pattern] for pattern in converter.source_patterns if pattern in groups}
    for operation in converter.operations:
        if isinstance(operation, core_model_loading.MergeModulelist):
            values = {pattern: [MergedSource(tuple(parts), operation.dim, stacked=True)] for pattern, parts in values.items()}
        elif isinstance(operation, core_model_loading.Concatenate):
            parts = [part for group in values.values() for part in group]
            values = {"": [MergedSource(tuple(parts), operation.dim, stacked=False)]}
        else:
            raise UnsupportedModelError(
                f"{target}: expected tensors that are renamed, stacked or concatenated, got some that need {type(operation).__name__}; "
                "load the model with transformers and pass the module"
            )
    ((source,),) = values.values()
    return source


def initialized_buffers(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Tensor]:
    """The values of buffers that no checkpoint holds, made on the CPU by the family's own initialization.

    Each owner is initialized twice over different contents: what comes out equal was written by it, and the rest is left out.
    """
    found: dict[str, Tensor] = {}
    for owner in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(owner)
        first, second = (_initialized(model, module, content) for content in (0, 1))
        found |= {f"{owner}.{name}".lstrip("."): value for name, value in first.items() if torch.equal(value, second[name])}
    return {name: found[name] for name in names if name in found}


def _initialized(model: PreTrainedModel, module: nn.Module, content: int) -> dict[str, Tensor]:
    real = copy.copy(module)
    buffers = {name: torch.full(value.shape, content, dtype=value.dtype) for name, value in module._buffers.items() if value is not None}
    # torch's own initialization refuses nothing on `meta`, so that the parameters can stay there.
    vars(real)["_buffers"] = dict(buffers)
    with torch.no_grad():
        model._init_weights(real)  # type: ignore[no-untyped-call]
    return {name: value for name, value in real._buffers.items() if value is not None}


def binder(model: PreTrainedModel, sources: Mapping[str, Source | Constant], name: str) -> Binder:
    """What the constants of `model` are: checkpoint tensors, initialized buffers, or unbound where there is no checkpoint.

    Raises (when called):
        UnboundConstantError: for a parameter that a checkpoint should hold and does not.
        SourceError: for a tensor of another shape.
    """
    aliases: dict[int, list[str]] = {}
    for alias, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        aliases.setdefault(id(tensor), []).append(alias)
    wanted = model.state_dict()
    absent = [key for key, _ in model.named_buffers() if key not in sources and key not in wanted]
    buffers = initialized_buffers(model, absent)

    def bind(key: str, traced: Tensor) -> Constant:
        known = aliases.get(id(traced), [key] if key in wanted or key in buffers else [])
        for alias in known:
            if alias in sources:
                return _fitted(sources[alias], traced, alias)
        if key in buffers:
            return tensor_constant(buffers[key])
        if not known:
            return _made_in_forward(key, traced, name)
        if sources or key not in wanted:
            raise UnboundConstantError(
                f"{name}: {key}: expected a value in the checkpoint, got none; give the complete checkpoint, or load it with transformers"
            )
        return Constant(UnboundSource(key, tuple(traced.shape), traced.dtype))

    return bind


class LostConstantError(UnboundConstantError):
    """A tensor that the forward itself makes from numbers, and whose numbers tracing on `meta` lost."""


def _made_in_forward(key: str, traced: Tensor, name: str) -> Constant:
    if traced.is_meta:
        raise LostConstantError(
            f"{name}: {key}: expected a value, got a tensor without one that the forward makes; load the model with transformers"
        )
    return tensor_constant(traced)


def _fitted(source: Source | Constant, traced: Tensor, name: str) -> Constant:
    constant = source if isinstance(source, Constant) else Constant(source)
    if constant.shape != tuple(traced.shape):
        raise SourceError(
            f"{name}: expected shape {tuple(traced.shape)}, got {constant.shape}; the weights belong to another configuration"
        )
    return constant if constant.dtype == traced.dtype else constant.then(Cast(traced.dtype))


def config_json(path: Path) -> dict[str, Any]:
    """The parsed config.json of a model.

    Raises:
        SourceError: if there is none, or it is no JSON object.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path}: expected a Hugging Face model directory with a config.json, got none") from error
    except OSError as error:
        raise SourceError(f"{path}: expected a file that can be read, got {error}") from error
    except ValueError as error:
        raise SourceError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(parsed, dict):
        raise SourceError(f"{path}: expected a JSON object, got {type(parsed).__name__}")
    return parsed
