"""What executes a plan: the reference, torch on CPUs, CUDA through libcuda."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompile.errors import EngineError

if TYPE_CHECKING:
    from qcompile.ir.lowered import Engine
    from qcompile.runtime.artifact import ArtifactContents

ENGINES = ("reference", "torch_cpu", "cuda")


def make_engine(
    contents: ArtifactContents, *, name: str | None = None, device: str | None = None, max_batch: int = 1, max_context: int = 2048
) -> Engine:
    """The engine called `name`, by default the one that the contents' target asks for and that can run here.

    Raises:
        EngineError: for an unknown name.
    """
    chosen = name or _default(contents.target, device)
    if chosen == "reference":
        from qcompile.runtime.engines.reference import ReferenceEngine

        return ReferenceEngine(contents, max_batch=max_batch, max_context=max_context)
    if chosen == "torch_cpu":
        from qcompile.runtime.engines.torch_cpu import TorchCpuEngine

        return TorchCpuEngine(contents, max_batch=max_batch, max_context=max_context)
    if chosen == "cuda":
        from qcompile.runtime.engines.cuda import CudaEngine

        return CudaEngine(contents, max_batch=max_batch, max_context=max_context, device=device or "cuda")
    raise EngineError(f"engine {chosen!r}: expected one of {', '.join(ENGINES)}")


def _default(target: str, device: str | None) -> str:
    """`cuda` only where there is a device: an artifact for a GPU is served by reference elsewhere."""
    import torch

    if target.startswith("sm") and (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        return "cuda"
    return "torch_cpu" if target.startswith("cpu") else "reference"
