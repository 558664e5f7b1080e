"""Quantized activations end in integer or float8 matmuls, and begin where their values are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.ir.graph import Graph, fake_value, operator_name
from qcompile.passes.activation_pairs import PRODUCERS, arguments, cancel, format_of, move_down, producer
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.quantizing_producers import fuse_producer
from qcompile.quant.activations import group_columns

aten = torch.ops.aten
qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class FuseQuantizeDequantize(Pass):
    """`linear(dequantize(x), dequantize(W))` becomes integer_linear or float8_linear, with the scales in its epilogue.

    A dequantize first moves through what only moves elements, and pairs that undo each other go. Then norm, residual sum, gated
    activation and rotation before a quantize become one operator with it. What stays apart is noted with the reason.
    """

    name: ClassVar[str] = "fuse-quantize-dequantize"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Before fuse-dequantize, which would take the weights; after fuse-residual-norm, whose sums fuse with their norm."""
        changed = False
        while any(move_down(graph, node, ctx.spend) for node in graph.calls(qcompile.dequantize_activation.default)):
            changed = True
        for quantize in graph.calls(*PRODUCERS):
            changed |= cancel(graph, quantize, ctx.spend)
        for linear in graph.calls(aten.linear.default):
            changed |= self._fuse_linear(graph, linear, ctx)
        changed |= graph.remove_dead() > 0
        for quantize in graph.calls(*PRODUCERS):
            reason = fuse_producer(graph, quantize, ctx.spend)
            changed |= reason == ""
            if reason:
                ctx.note(self.name, quantize.name, reason, chosen=True)
        for dequantize in graph.calls(qcompile.dequantize_activation.default):
            ctx.note(self.name, dequantize.name, _why_kept(dequantize))
        return changed

    def _fuse_linear(self, graph: Graph, linear: fx.Node, ctx: PassContext) -> bool:
        x, weight = linear.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or _refusal(x, weight) or not ctx.spend():
            return False
        codes, scale, zero, group_size, _ = x.args
        packed = arguments(weight)
        bias = linear.args[2] if len(linear.args) > 2 else None
        dtype = fake_value(linear).dtype
        args: tuple[Any, ...] = (codes, scale, zero, packed["codes"], packed["scale"], packed["zero"], bias, group_size)
        if packed["element"] == "int":
            operation, args = qcompile.integer_linear.default, (*args, packed["bits"], packed["group_size"], dtype)
        else:
            operation = qcompile.float8_linear.default
            args = (codes, scale, packed["codes"], packed["scale"], bias, group_size, packed["group_size"], dtype)
        if packed["scale2"] is not None:
            args = (*args, packed["scale2"])
        fused = graph.insert(linear, operation, args, source=linear)
        history = [step for step in (*weight.meta["passes"], *x.meta["passes"]) if step not in fused.meta["passes"]]
        fused.meta["passes"] = (*fused.meta["passes"][:-1], *dict.fromkeys(history), self.name)
        graph.replace(linear, fused)
        return True


def _refusal(x: fx.Node, weight: fx.Node) -> str:
    """Why a linear of these operands is no integer or float8 matmul; empty if it is."""
    if x.target is not qcompile.dequantize_activation.default:
        return "its activations are not quantized"
    if weight.target is not qcompile.dequantize.default:
        return "its weight is not quantized"
    form, packed = format_of(producer(x.args[0])), arguments(weight)
    if form is None:
        return "where its codes come from is not known"
    if form.element.kind != packed["element"]:
        return f"no matmul of {form.element.name} activations with {packed['element']} weights: both have to be integers, or fp8"
    if packed["element"] not in ("int", "fp8"):
        return f"no matmul of {packed['element']} codes"
    columns = int(fake_value(x).shape[-1])
    small, large = sorted(group_columns(columns, size) for size in (form.granularity.group_size, packed["group_size"]))
    if large < columns and large % small:
        return f"groups of {small} and {large} columns do not nest; set group_size"
    return ""


def _why_kept(dequantize: fx.Node) -> str:
    """What reads a dequantized activation, and why it does not read codes."""
    for user in dequantize.users:
        if user.target is aten.linear.default and user.args[0] is dequantize and isinstance(user.args[1], fx.Node):
            reason = _refusal(dequantize, user.args[1])
            return reason or "no fuel left"
        return f"{operator_name(user.target)} multiplies dequantized values: there is no integer operator for it"
    return "nothing reads it"
