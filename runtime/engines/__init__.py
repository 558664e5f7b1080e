"""What executes a plan: the reference, torch or C++ kernels on CPUs, CUDA through libcuda, and onnxruntime beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from qcompile.errors import EngineError
from qcompile.runtime.native.processor import best_library

if TYPE_CHECKING:
    from qcompile.ir.lowered import Engine
    from qcompile.runtime.artifact import ArtifactContents


class _Sizes(TypedDict):
    max_batch: int
    max_context: int
    page_tokens: int | None
    kv_bytes: int | None


ENGINES = ("reference", "torch_cpu", "native", "cuda", "onnxruntime")


def has_onnxruntime() -> bool:
    """Whether onnxruntime can be imported."""
    return importlib.util.find_spec("onnxruntime") is not None


def require_onnxruntime() -> None:
    """Refuse to go on without it.

    Raises:
        EngineError: with the remedy.
    """
    if not has_onnxruntime():
        raise EngineError(
            "engine onnxruntime: expected the package onnxruntime, got none installed; pip install 'qcompile[onnx]', or load with "
            "engine='reference'"
        )


def make_engine(
    contents: ArtifactContents, *, name: str | None = None, device: str | None = None, max_batch: int = 1, max_context: int = 2048,
    page_tokens: int | None = None, kv_bytes: int | None = None, share_prefixes: bool = False, onnx_model: Path | None = None,
) -> Engine:  # fmt: skip
    """The engine called `name`, by default the one that the contents' target asks for and that can run here.

    Raises:
        EngineError: for an unknown name, or `onnxruntime` without `onnx_model`, the file that was exported from the contents' graph.
        CapacityError: if the cache has no room for a page for each row.
    """
    require_known(name)
    chosen = name or default_engine(contents, device)
    sizes: _Sizes = {"max_batch": max_batch, "max_context": max_context, "page_tokens": page_tokens, "kv_bytes": kv_bytes}
    if chosen == "reference":
        from qcompile.runtime.engines.reference import ReferenceEngine

        return ReferenceEngine(contents, share_prefixes=share_prefixes, **sizes)
    if chosen == "torch_cpu":
        from qcompile.runtime.engines.torch_cpu import TorchCpuEngine

        return TorchCpuEngine(contents, share_prefixes=share_prefixes, **sizes)
    if chosen == "native":
        from qcompile.runtime.engines.native import NativeEngine

        return NativeEngine(contents, share_prefixes=share_prefixes, **sizes)
    if chosen == "cuda":
        from qcompile.runtime.engines.cuda import CudaEngine

        return CudaEngine(contents, share_prefixes=share_prefixes, device=device or "cuda", **sizes)
    from qcompile.runtime.engines.onnxruntime import OnnxRuntimeEngine

    if onnx_model is None:
        raise EngineError("engine onnxruntime: expected the ONNX file of the model, got none; use CompiledModel, which makes it")
    return OnnxRuntimeEngine(contents, onnx_model, share_prefixes=share_prefixes, **sizes)


def require_known(name: str | None) -> None:
    """Refuse a name that no engine has; None is whatever the target asks for.

    Raises:
        EngineError: listing those that there are.
    """
    if name is not None and name not in ENGINES:
        raise EngineError(f"engine {name!r}: expected one of {', '.join(ENGINES)}")


def default_engine(contents: ArtifactContents, device: str | None = None) -> str:
    """What a target asks for and can be had here: `cuda` with a device, `onnxruntime` if installed, `native` with a library.

    Else `torch_cpu` serves targets of CPUs, `reference` all others.
    """
    import torch

    target = contents.target
    if target.startswith("sm") and (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        return "cuda"
    if target.startswith("onnx"):
        return "onnxruntime" if has_onnxruntime() else "reference"
    if target.startswith("cpu"):
        return "torch_cpu" if best_library(contents.binaries) is None else "native"
    return "reference"
