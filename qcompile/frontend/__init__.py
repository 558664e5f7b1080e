"""Front ends: from what a user calls a model to a Graph and its assets."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from qcompile.errors import SourceError, TraceError
from qcompile.frontend.capture import capture_exported, capture_module
from qcompile.frontend.loaded import Loaded
from qcompile.ir.records import Assets

__all__ = ["Loaded", "capture_exported", "capture_module", "load"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load(
    model: nn.Module | ExportedProgram | str | Path, *, example_inputs: Any = None, dynamic_shapes: Any = None,
    revision: str | None = None, trust_remote_code: bool = False, weights: bool = True,
) -> Loaded:  # fmt: skip
    """Capture a model.

    Args:
        model: a module, an exported program, a Hugging Face directory, the name of a model on the hub, a .gguf or an .onnx file.
        example_inputs: a tensor, a tuple of positional inputs or a mapping of keyword inputs; a Hugging Face model of text or
            images and an ONNX model need none.
        dynamic_shapes: see `capture_module`.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run the code that a model directory brings along; never implied.
        weights: False is for planning: a hub's weights are not downloaded, and a bare configuration (.json) will do; constants whose
            values are not at hand are unbound.

    Raises:
        TraceError: if a module cannot be traced, or needs example inputs.
        SourceError: if a path is none of these, or damaged.
        UnsupportedModelError: if the model is understood and cannot be served.
    """
    if isinstance(model, ExportedProgram):
        return Loaded(capture_exported(model), Assets(model_type="exported", name="exported"))
    if isinstance(model, nn.Module):
        return _load_module(model, example_inputs, dynamic_shapes)
    path = Path(model)
    if path.suffix == ".onnx":
        return _reader("onnx", "load_onnx", path)(path, example_inputs, dynamic_shapes)
    if path.suffix == ".gguf":
        return _reader("gguf", "load_gguf", path)(path)
    if path.suffix == ".json" and path.is_file() and not weights:
        return _reader("huggingface", "load_config", path)(path, trust_remote_code, example_inputs, dynamic_shapes)
    if path.is_dir():
        return _reader("huggingface", "load_directory", path)(path, trust_remote_code, example_inputs, dynamic_shapes)
    if path.exists() or not _HUB_NAME.fullmatch(str(model)) or path.suffix == ".json":
        config = "" if weights else "a config.json, "
        raise SourceError(
            f"{path}: expected a Hugging Face directory, {config}a .gguf or .onnx file or the name of a model on the hub, "
            f"got {'another file' if path.exists() else 'a path that does not exist'}"
        )
    options = (revision, trust_remote_code, example_inputs, dynamic_shapes)
    return _reader("huggingface", "load_hub", path)(str(model), *options, weights=weights)


def _reader(module: str, function: str, model: object) -> Callable[..., Loaded]:
    """A function of one of the front ends whose packages plain modules do without."""
    try:
        found: Callable[..., Loaded] = getattr(importlib.import_module(f"qcompile.frontend.{module}"), function)
    except ModuleNotFoundError as error:
        extra = "onnx" if module == "onnx" else "huggingface"
        raise SourceError(
            f"{model}: expected the packages that read this model, got no {error.name}; pip install 'qcompile[{extra}]'"
        ) from error
    return found


def _load_module(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Loaded:
    name = type(model).__name__
    if _is_pretrained(model):
        return _reader("huggingface", "load_model", name)(model, example_inputs, dynamic_shapes)
    if example_inputs is None:
        raise TraceError(f"{name}: expected example_inputs for a plain module, got none; pass a tensor, a tuple or a dict of them")
    return Loaded(capture_module(model, example_inputs, dynamic_shapes, name=name), Assets(model_type=name, name=name))


def _is_pretrained(model: nn.Module) -> bool:
    """Whether it is a transformers model, without importing transformers for one that is not."""
    return any(base.__module__ == "transformers.modeling_utils" and base.__name__ == "PreTrainedModel" for base in type(model).__mro__)
