"""The reference backend: every operator is its definition in plain torch. It refuses nothing and is the oracle of the others."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.ir.lowered import Kernel, KernelSpec


@dataclass(frozen=True)
class ReferenceBackend:
    """Serves every specification by the operator's own reference; there is no source to emit.

    Attributes:
        name: `reference`, or `torch_cpu` or `onnxruntime` where the engine has kernels of its own for the same definitions.
        instead: why it serves in place of a backend that emits kernels; "" where it is what the target asks for.
    """

    name: str = "reference"
    instead: str = ""

    def refuses(self, spec: KernelSpec) -> str | None:
        """Never."""
        del spec
        return None

    def emit(self, spec: KernelSpec) -> Kernel:
        """A kernel without launches: the engine calls the operator."""
        return Kernel(f"{self.name}.{spec.operator}", spec, "")
