"""For every operator a kernel of the backend, or the reference and the reason why; the coverage table is made here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.graph import Graph, operator_name
from qcompile.ir.lowered import Backend, Kernel, KernelSpec
from qcompile.ir.records import CoverageRow
from qcompile.passes.activation_pairs import ACTIVATION_READERS, PRODUCERS, format_of, producer
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.kernel_specs import kernel_specs
from qcompile.quant.scheme import dtype_name

aten = torch.ops.aten
qcompile = torch.ops.qcompile
COVERED = (
    aten.linear.default, aten.embedding.default, aten.conv1d.default, aten.conv2d.default,
    qcompile.quantized_linear.default, qcompile.quantized_embedding.default,
    qcompile.integer_linear.default, qcompile.float8_linear.default, qcompile.integer_conv2d.default,
    qcompile.hadamard.default, qcompile.dequantize_activation.default, *PRODUCERS,
    qcompile.append_packed.default, qcompile.with_recent.default, qcompile.settle.default, qcompile.retain.default,
    qcompile.attention.default, qcompile.cache_attend.default, qcompile.cache_attend_packed.default, qcompile.attend_settled.default,
    qcompile.attend_ranked.default, qcompile.attend_rematerialized.default, qcompile.attend_settled_sources.default,
    qcompile.moe_experts.default, aten.scaled_dot_product_attention.default,
)  # fmt: skip
_WITHOUT_WEIGHT = (*PRODUCERS, qcompile.hadamard.default, qcompile.dequantize_activation.default)
_UNPACKING = (qcompile.dequantize.default, aten.reshape.default, aten.to.dtype)
_CACHED = {
    qcompile.append_packed.default: slice(6, 8),
    qcompile.cache_attend_packed.default: slice(5, 7),
    qcompile.settle.default: slice(4, 5),
    qcompile.attend_settled.default: slice(7, 9),
}
"""Operators over a packed cache -> where they take the formats of what they read or write."""
REFERENCE = "reference"


@dataclass(frozen=True)
class LowerToKernels(Pass):
    """Choose a kernel per operator and row bucket from the backend; refused operators run as their reference."""

    name: ClassVar[str] = "lower-to-kernels"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Annotates nodes (`meta["kernels"]`: bucket -> kernel name) and collects `ctx.products["kernels"]`; rewrites nothing."""
        kernels: dict[KernelSpec, Kernel] = {}
        notes = {node: (reason, chosen) for _, node, reason, chosen in ctx.notes}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            specs = kernel_specs(graph, node)
            refused = assign_kernels(node, specs, ctx.backend, kernels)
            if node.target in COVERED:
                ctx.coverage.append(_coverage_row(graph, node, notes.get(node.name, ("", False)), refused, ctx.backend))
        ctx.products["kernels"] = {kernel.name: kernel for kernel in kernels.values()}
        return False


def assign_kernels(node: fx.Node, specs: dict[str, KernelSpec], backend: Backend | None, kernels: dict[KernelSpec, Kernel]) -> str:
    """Give the node its kernels; returns why not, where it is refused."""
    if backend is None:
        return ""
    specs = specs or {"": KernelSpec(operator_name(node.target), (), ())}
    for spec in specs.values():
        reason = backend.refuses(spec)
        if reason is not None:
            return f"{spec.operator}{f' [{spec.bucket}]' if spec.bucket else ''}: {reason}"
    for spec in specs.values():
        if spec not in kernels:
            kernels[spec] = backend.emit(spec)
    node.meta["kernels"] = {bucket: kernels[spec].name for bucket, spec in specs.items()}
    return ""


def _coverage_row(graph: Graph, node: fx.Node, note: tuple[str, bool], refused: str, backend: Backend | None) -> CoverageRow:
    weight = next((str(used.target) for used in _weights(graph, node)), "")
    constant = graph.constants.get(weight)
    result = node.meta["val"][0] if isinstance(node.meta["val"], tuple | list) else node.meta["val"]
    form = str(constant.format) if constant is not None and constant.format is not None else dtype_name(result.dtype)
    activation = str(format_of(producer(node.args[0]) if node.target in ACTIVATION_READERS else node) or "")
    if node.target in _WITHOUT_WEIGHT:
        weight, form, activation = "", activation or form, ""
    if node.target in _CACHED:
        form = " / ".join(dict.fromkeys(map(str, node.args[_CACHED[node.target]])))
        activation = "int16" if node.kwargs.get("products") == "fast" else ""
    names = node.meta.get("kernels")
    kernel = ", ".join(dict.fromkeys(names.values())) if names else REFERENCE
    reason, chosen = note
    why = "; ".join(part for part in (reason, refused and f"refused by {backend.name if backend else ''}: {refused}") if part)
    module = weight.removesuffix(".codes")
    return CoverageRow(
        node.name,
        operator_name(node.target),
        module,
        form,
        kernel,
        why,
        node.meta.get("source", ""),
        chosen and not refused,
        activation,
    )


def _weights(graph: Graph, node: fx.Node) -> Iterable[fx.Node]:
    """The constants that the node reads, also through what only unpacks or reshapes them: codes first, then by size."""
    constants: list[fx.Node] = []
    pending = list(node.all_input_nodes)
    while pending:
        used = pending.pop(0)
        if used.op == "get_attr":
            constants.append(used)
        elif used.target in _UNPACKING:
            pending += used.all_input_nodes
    return sorted(constants, key=lambda used: (not str(used.target).endswith(".codes"), -graph.constants[str(used.target)].nbytes))
