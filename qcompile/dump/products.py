"""What came out of a compilation, as JSON values: coverage, notes, cache, sizes, kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Plan
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.runtime.accounting import bits_per_weight, cache_bytes_per_sequence, cache_bytes_per_token
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layers import cache_layers


def note_rows(notes: Sequence[tuple[str, str, str, bool]]) -> list[dict[str, Any]]:
    """What passes left alone: which pass, which node, why, and whether the scheme or the user chose so."""
    return [{"pass": where, "node": node, "reason": reason, "chosen": chosen} for where, node, reason, chosen in notes]


def cache_rows(plan: Plan) -> list[dict[str, Any]]:
    """The cache of each layer; empty for a model without one."""
    return [layer.to_dict() for layer in cache_layers(plan)]


def size_values(contents: ArtifactContents) -> dict[str, Any]:
    """Bytes by purpose; `arena_bytes` of the entry that needs most, 0 where buffers are allocated per call."""
    plan = contents.plan
    return {
        "target": contents.target,
        "weight_bytes": contents.weight_bytes,
        "bits_per_weight": bits_per_weight(contents.constants, plan),
        "kv_bytes_per_token": cache_bytes_per_token(plan),
        "kv_bytes_per_sequence": cache_bytes_per_sequence(plan),
        "arena_bytes": max((entry.arena_bytes for entry in plan.entries.values()), default=0),
        "binary_bytes": binary_bytes(contents),
    }


def binary_bytes(contents: ArtifactContents) -> int:
    """Of what was built of kernels, without the source of libraries."""
    return sum(len(code) for name, code in contents.binaries.items() if name != NATIVE_SOURCE)


def kernel_rows(plan: Plan, kernels: Mapping[str, Kernel]) -> list[dict[str, Any]]:
    """Each kernel that a plan runs or that has a source, the nodes that it serves and what its launches take.

    `file` is null where an engine brings its own code; such a kernel may be missing in `kernels`.
    """
    served: dict[str, dict[str, None]] = {}
    operators: dict[str, str] = {}
    for entry in plan.entries.values():
        for step in entry.steps:
            for name in step.kernels.values():
                served.setdefault(name, {})[step.node] = None
                operators[name] = step.operator.removeprefix("qcompile.").removesuffix(".default")
    names = dict.fromkeys([*(name for name in kernels if kernels[name].source or name in served), *served])
    return [_kernel_row(name, kernels.get(name), operators.get(name, ""), list(served.get(name, {}))) for name in names]


def _kernel_row(name: str, kernel: Kernel | None, operator: str, nodes: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "spec": operator if kernel is None else spec_text(kernel.spec),
        "file": f"kernels/{name}{kernel.suffix}" if kernel is not None and kernel.source else None,
        "nodes": nodes,
        "launches": [] if kernel is None else [_launch(launch) for launch in kernel.launches],
    }


def _launch(launch: Launch) -> dict[str, Any]:
    return {
        "function": launch.function,
        "registers": launch.registers,
        "shared_bytes": launch.shared_bytes,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def spec_text(spec: KernelSpec) -> str:
    """A specification in one line: `quantized_linear [m1] K=576 N=1536, codes: int4 g64 sym fp16, x: bf16, eps=1e-05`."""
    sizes = " ".join(f"{name}={size}" for name, size in spec.sizes)
    head = " ".join(part for part in (spec.operator, f"[{spec.bucket}]" if spec.bucket else "", sizes) if part)
    formats = [f"{name}: {form}" for name, form in spec.formats]
    return ", ".join([head, *formats, *(f"{name}={value}" for name, value in spec.options)])
