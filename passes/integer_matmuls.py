"""Linears and convolutions of dequantized activations and dequantized weights, as operators that read both as codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.graph import Graph, fake_value, operator_name
from qcompile.passes.activation_pairs import arguments, format_of, producer
from qcompile.quant.activations import group_columns

aten = torch.ops.aten
qcompile = torch.ops.qcompile
MATMULS = (aten.linear.default, aten.conv2d.default)


def fuse_matmul(graph: Graph, node: fx.Node) -> None:
    """Replace a linear or convolution for which `refusal` is empty."""
    x: Any = node.args[0]
    weight = _dequantize(node)
    packed = arguments(weight)
    build = _convolution if node.target is aten.conv2d.default else _integer if packed["element"] == "int" else _float8
    operation, args = build(x, packed, node)
    fused = graph.insert(node, operation, args, source=node)
    history = [step for step in (*weight.meta["passes"], *x.meta["passes"]) if step not in fused.meta["passes"]]
    fused.meta["passes"] = (*fused.meta["passes"][:-1], *dict.fromkeys(history), graph.current_pass)
    graph.replace(node, fused)


def refusal(node: fx.Node) -> str:
    """Why a linear or convolution cannot read codes; empty if it can."""
    x: Any = node.args[0]
    weight = _dequantize(node)
    if x.target is not qcompile.dequantize_activation.default:
        return "its activations are not quantized"
    if weight.target is not qcompile.dequantize.default:
        return "its weight is not quantized"
    form, packed = format_of(producer(x.args[0])), arguments(weight)
    if form is None:
        return "where its codes come from is not known"
    if form.element.kind != packed["element"] or packed["element"] not in ("int", "fp8"):
        return f"no matmul of {form.element.name} activations with {packed['element']} weights: both have to be integers, or fp8"
    if node.target is aten.conv2d.default:
        plain = packed["zero"] is None and packed["scale2"] is None and packed["group_size"] == -1 and packed["element"] == "int"
        plain = plain and form.static and isinstance(arguments(node)["padding"], list | tuple)
        return "" if plain else "a convolution of codes wants static activations and symmetric integer weights with one scale per channel"
    columns = int(fake_value(x).shape[-1])
    small, large = sorted(group_columns(columns, size) for size in (form.granularity.group_size, packed["group_size"]))
    return f"groups of {small} and {large} columns do not nest; set group_size" if large < columns and large % small else ""


def why_kept(dequantize: fx.Node) -> str:
    """What reads a dequantized activation, and why it does not read codes."""
    for user in dequantize.users:
        if user.target in MATMULS and user.args[0] is dequantize:
            return refusal(user) or "no fuel left"
        return f"{operator_name(user.target)} computes with dequantized values: there is no integer operator for it"
    return "nothing reads it"


def _dequantize(node: fx.Node) -> fx.Node:
    """The node that makes the weight's matrix: filters are unfolded from it."""
    weight: Any = node.args[1]
    unfolds = node.target is aten.conv2d.default and weight.target is aten.reshape.default
    return weight.args[0] if unfolds else weight  # type: ignore[no-any-return]


def _second(packed: dict[str, Any]) -> tuple[Any, ...]:
    return () if packed["scale2"] is None else (packed["scale2"],)


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _integer(x: fx.Node, packed: dict[str, Any], node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    codes, scale, zero, group_size, _ = x.args
    weight = (packed["codes"], packed["scale"], packed["zero"], _bias(node))
    sizes = (group_size, packed["bits"], packed["group_size"], fake_value(node).dtype)
    return qcompile.integer_linear.default, (codes, scale, zero, *weight, *sizes, *_second(packed))


def _float8(x: fx.Node, packed: dict[str, Any], node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    codes, scale, _, group_size, _ = x.args
    weight = (packed["codes"], packed["scale"], _bias(node))
    return qcompile.float8_linear.default, (
        codes,
        scale,
        *weight,
        group_size,
        packed["group_size"],
        fake_value(node).dtype,
        *_second(packed),
    )


def _convolution(x: fx.Node, packed: dict[str, Any], node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    codes, scale, zero, *_ = x.args
    options = arguments(node)
    kernel = [int(size) for size in fake_value(node.args[1]).shape[2:]]
    windows = (options["stride"], options["padding"], options["dilation"], options["groups"])
    parts = (codes, scale, zero, packed["codes"], packed["scale"], options["bias"])
    return qcompile.integer_conv2d.default, (*parts, kernel, *windows, packed["bits"], fake_value(node).dtype)
