"""Quantize/dequantize pairs of activations: where codes come from, how a dequantize moves down, when a pair cancels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.ir.graph import Graph, fake_value
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.element import element_of
from qcompile.quant.granularity import Granularity

aten = torch.ops.aten
qcompile = torch.ops.qcompile
QUANTIZE = (qcompile.quantize_activation.default, qcompile.quantize_activation_asym.default, qcompile.quantize_static.default)
ASYMMETRIC = (
    qcompile.quantize_activation_asym.default, qcompile.norm_quantize_asym.default, qcompile.add_norm_quantize_asym.default,
    qcompile.gated_quantize_asym.default, qcompile.hadamard_quantize_asym.default,
)  # fmt: skip
"""Operators that make codes with a zero point of each scale."""
PRODUCERS = (
    qcompile.quantize_activation.default, qcompile.quantize_static.default, qcompile.norm_quantize.default,
    qcompile.add_norm_quantize.default, qcompile.gated_quantize.default, qcompile.hadamard_quantize.default, *ASYMMETRIC,
)  # fmt: skip
"""Operators that make codes."""
ACTIVATION_READERS = (
    qcompile.integer_linear.default, qcompile.float8_linear.default, qcompile.integer_conv2d.default,
    qcompile.dequantize_activation.default,
)  # fmt: skip
"""Operators that read codes, as their first argument."""
_MOVES = (
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.select.int,
    aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.t.default, aten.clone.default,
)  # fmt: skip
"""Operators that only place elements elsewhere or leave some out."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the names of the operator's schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def producer(codes: object) -> fx.Node | None:
    """The operator that made codes, through whatever moved them since."""
    node = codes
    while isinstance(node, fx.Node) and node.target in (operator.getitem, *_MOVES):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.target in PRODUCERS else None


def format_of(node: fx.Node | None) -> ActivationFormat | None:
    """The format that a producer of codes makes them in."""
    if node is None or node.target not in PRODUCERS:
        return None
    options = arguments(node)
    static = node.target is qcompile.quantize_static.default
    symmetric = options["zero"] is None if static else node.target not in ASYMMETRIC
    form = element_of(options.get("element", "int"), options["bits"])
    return ActivationFormat(form, Granularity(options.get("group_size", -1)), symmetric, static, options.get("clip", 1.0))


def move_down(graph: Graph, dequantize: fx.Node, spend: Callable[[], bool]) -> bool:
    """Dequantize after what only moves elements, so that it meets the operator that reads them; true iff it moved."""
    moved = False
    codes, scale, zero, group_size, dtype = dequantize.args
    for view in [user for user in dequantize.users if _movable(dequantize, user)]:
        if spend():
            parts = (_viewed(graph, codes, view), *(_moved_scale(graph, part, view, fake_value(dequantize)) for part in (scale, zero)))
            below = graph.insert(view, qcompile.dequantize_activation.default, (*parts, group_size, dtype), source=dequantize)
            graph.replace(view, below)
            moved = True
    if moved and not dequantize.users:
        graph.fx.erase_node(dequantize)
    return moved


def _shared(dequantize: fx.Node) -> bool:
    """Whether one scale serves every token."""
    return fake_value(dequantize.args[1]).dim() == 1 and fake_value(dequantize).dim() > 1


def _movable(dequantize: fx.Node, view: fx.Node) -> bool:
    """Whether every number keeps its scale if `view` comes first: its last axis stays, or what is cut out of it shares one scale."""
    if view.target not in _MOVES or view.args[0] is not dequantize or view.kwargs:
        return False
    if _shared(dequantize) or _keeps_last(view, fake_value(dequantize), fake_value(view)):
        return True
    return view.target is aten.slice.Tensor and fake_value(dequantize.args[1]).shape[-1] == 1


def _viewed(graph: Graph, value: Any, view: fx.Node, *args: Any) -> fx.Node:
    return graph.insert(view, view.target, (value, *(args or view.args[1:])), source=view)  # type: ignore[arg-type]


def _moved_scale(graph: Graph, scale: Any, view: fx.Node, before: torch.Tensor) -> fx.Node | None:
    """The scale or zero [..., G] of a dequantize after `view`; None stays None."""
    if scale is None or (fake_value(scale).dim() == 1 and before.dim() > 1) or not _keeps_last(view, before, fake_value(view)):
        return scale  # type: ignore[no-any-return]
    args: list[Any] = list(view.args[1:])
    if view.target in (aten.reshape.default, aten.expand.default):
        args[0] = [*args[0][:-1], fake_value(scale).shape[-1]]
    return _viewed(graph, scale, view, *args)


def _keeps_last(view: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the last axis of the result is the last axis of the operand."""
    args: Any = view.args[1:]
    target, rank = view.target, before.dim()
    if target is aten.t.default or not after.dim() or not isinstance(before.shape[-1], int) or after.shape[-1] != before.shape[-1]:
        return False
    if target is aten.transpose.int:
        return rank - 1 not in {axis % rank for axis in args}
    if target is aten.permute.default:
        return bool(args[0][-1] % rank == rank - 1)
    if target in (aten.slice.Tensor, aten.select.int):
        return bool((args[0] if args else 0) % rank != rank - 1)
    if target in (aten.unsqueeze.default, aten.squeeze.dim):
        return bool(args[0] % after.dim() != after.dim() - 1 and args[0] != -1)
    if target in (aten.flatten.using_ints, aten.unflatten.int):
        return _inner_axes(view, rank)
    return True


def _inner_axes(view: fx.Node, rank: int) -> bool:
    """Whether a flatten or unflatten leaves the last axis out."""
    options = arguments(view)
    touched = options["end_dim"] if view.target is aten.flatten.using_ints else options["dim"]
    return int(touched) % rank != rank - 1


def cancel(graph: Graph, quantize: fx.Node, spend: Callable[[], bool]) -> bool:
    """Codes that are dequantized and quantized again in the same format stay what they were; true iff `quantize` went.

    Not where a dynamic range is asymmetric: a tie in its zero point leaves one end without a code, and the next range is shorter.
    """
    dequantize = quantize.args[0]
    if (
        quantize.target not in QUANTIZE
        or not isinstance(dequantize, fx.Node)
        or dequantize.target is not qcompile.dequantize_activation.default
    ):
        return False
    source = producer(dequantize.args[0])
    form = format_of(quantize)
    if form is None or form.clip != 1 or form != format_of(source) or not (form.symmetric or form.static):
        return False
    if form.static:
        if quantize.args[1:3] != dequantize.args[1:3] or not spend():
            return False
        graph.replace(quantize, dequantize.args[0])  # type: ignore[arg-type]
        return True
    if fake_value(dequantize.args[1]).dim() != fake_value(dequantize).dim() or not spend():
        return False
    for part in list(quantize.users):
        graph.replace(part, dequantize.args[part.args[1]])  # type: ignore[arg-type, index]
    graph.fx.erase_node(quantize)
    return True
