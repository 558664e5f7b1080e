"""The last pass: nodes become steps over buffers, with lifetimes, offsets in one arena, and the cache written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Kernel, KernelSpec, Plan
from qcompile.ir.memory import plan_entry
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.kernel_specs import kernel_specs
from qcompile.passes.lower_to_kernels import assign_kernels
from qcompile.passes.steps import StepBuilder

qcompile = torch.ops.qcompile
_QUANTIZED_INPUT = (qcompile.integer_linear.default, qcompile.float8_linear.default)
_LINEARS = (torch.ops.aten.linear.default, qcompile.quantized_linear.default, *_QUANTIZED_INPUT)


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Make `ctx.products["plan"]`: `forward`, and for a model with a cache `prefill` (last logits only) and `decode` (one token)."""

    name: ClassVar[str] = "plan-memory"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Reads the graph and rewrites nothing."""
        if graph.interface.kind == "cached_lm":
            last = last_logits_only(graph)
            _lower_gather(last, ctx)
            entries = [
                plan_entry(StepBuilder(graph).entry("forward"), {}),
                plan_entry(StepBuilder(last).entry("prefill"), {"batch": ctx.max_batch, "sequence": ctx.prefill_chunk}),
                plan_entry(StepBuilder(graph).entry("decode"), {"batch": ctx.max_batch, "sequence": 1}),
            ]
        else:
            entries = [plan_entry(StepBuilder(graph).entry("forward"), {"batch": ctx.max_batch, "sequence": ctx.max_context})]
        kernels = tuple(sorted({name for entry in entries for step in entry.steps for name in step.kernels.values()}))
        ctx.products["plan"] = Plan({entry.name: entry for entry in entries}, kernels)
        return False


def _lower_gather(graph: Graph, ctx: PassContext) -> None:
    """The one operator that planning adds gets its kernel here."""
    made: dict[KernelSpec, Kernel] = {}
    for node in graph.calls(qcompile.gather_last.default):
        assign_kernels(node, kernel_specs(graph, node), ctx.backend, made)
    ctx.products["kernels"] = ctx.products.get("kernels", {}) | {kernel.name: kernel for kernel in made.values()}


def last_logits_only(graph: Graph) -> Graph:
    """A copy that computes logits [B, 1, V] of each sequence's last real token: the head sees one row per sequence."""
    copy = graph.clone()
    positions = next(node for node in copy.placeholders if node.name == "positions")
    tail = _token_wise_tail(copy.output.args[0][0])  # type: ignore[index, arg-type]
    first = tail[0]
    for source in _token_rows(first):
        gathered = copy.insert(first, qcompile.gather_last.default, (source, positions), source=first)
        first.replace_input_with(source, gathered)
    for node in tail:
        node.meta["val"] = copy.infer(node)
    return copy


def _token_rows(first: fx.Node) -> list[fx.Node]:
    """What the first node of the tail reads of each token: its input, or codes with their scales and zero points."""
    if first.target not in _QUANTIZED_INPUT:
        assert isinstance(first.args[0], fx.Node)
        return [first.args[0]]
    return [node for node in first.all_input_nodes if node.op == "call_function"]


def _token_wise_tail(logits: fx.Node) -> list[fx.Node]:
    """The chain from the head's linear to the logits, in order: each reads one computed tensor [B, S, *]."""
    chain = [logits]
    while chain[0].target not in _LINEARS:
        computed = [node for node in chain[0].all_input_nodes if node.op == "call_function"]
        if len(computed) != 1:
            break
        chain.insert(0, computed[0])
    return chain
