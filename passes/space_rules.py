"""What each operator lets a map do: one table from operator to rule.

A rule reads the layouts of a node's operands, ties, cuts or pins them, and returns the layout of the result. It must account for
every tensor it is given; a constant that it does not ask for is pinned. See `docs/spaces.md` for how to write one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.basis import Kind
from qcompile.passes.space_convolutions import CONVOLUTION_RULES
from qcompile.passes.space_elementwise import ELEMENTWISE_RULES
from qcompile.passes.space_shapes import SHAPE_RULES, collapse
from qcompile.passes.space_system import Identity, Layout, Layouts, MemberKey, Rule, System, dual

aten = torch.ops.aten
qcompile = torch.ops.qcompile


def affine(system: System, node: fx.Node, x: fx.Node, weight: object, bias: object, *, transposed: bool = False) -> Layouts:
    """`x Wᵀ + b` for W [N, K] (`transposed`: W [K, N]): reads one space, writes another, absorbs any map of either."""
    layouts = system.constant(weight, (0, 1)) if isinstance(weight, fx.Node) and weight.meta["val"].dim() == 2 else None
    if layouts is None:
        return system.block(node, _why_no_constant(weight, "weight"))
    rows, columns = reversed(layouts) if transposed else layouts
    read, written = system.channels(x, -1, node), rows.reshape(-1)
    system.tie(read, dual(columns.reshape(-1)), node)
    system.reads.append((node, read))
    result = written.view(*[1] * (node.meta["val"].dim() - 1), -1)
    system.writes.append((node, result))
    if isinstance(bias, fx.Node):
        system.tie(result, system.value(bias), node)
    return result


def _why_no_constant(weight: object, what: str) -> str:
    if isinstance(weight, fx.Node) and weight.target is qcompile.dequantize.default:
        return f"its {what} is quantized: change bases before"
    return f"its {what} is computed, not a constant"


def linear(system: System, node: fx.Node) -> Layouts:
    """`linear(x, W[N, K], bias)`."""
    x, weight, bias = (*node.args, None)[:3]
    return affine(system, node, x, weight, bias)  # type: ignore[arg-type]


def addmm(system: System, node: fx.Node) -> Layouts:
    """`bias + x @ W[K, N]`."""
    bias, x, weight = node.args[:3]
    return affine(system, node, x, weight, bias, transposed=True)  # type: ignore[arg-type]


def matmul(system: System, node: fx.Node) -> Layouts:
    """`x @ W[K, N]` with a constant W is a linear; of two activations, the contracted channels are dual to each other."""
    x, y = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(y, fx.Node)
    if system.constant_view(y) is not None and y.meta["val"].dim() == 2:
        return affine(system, node, x, y, None, transposed=True)
    if x.meta["val"].dim() < 2 or y.meta["val"].dim() < 2:
        return system.block(node, "a product with a vector")
    return _product(system, node, x, y)


def _product(system: System, node: fx.Node, x: fx.Node, y: fx.Node) -> Layouts:
    """Scores (`q kᵀ`) contract channels with channels; mixing (`p v`) contracts what holds none and keeps the channels of v."""
    left, right = system.value(x), system.value(y)
    if _varies(left, -1) or _varies(right, -2):
        read, stood = system.channels(x, -1, node), system.channels(y, -2, node)
        if _varies(read, -2) or _varies(stood, -1):
            return system.block(node, "contracts one of two axes of channels")
        system.cut(read, -1)
        system.tie(read, dual(stood.transpose(-1, -2)), node)
        return Identity(node.name, "holds products, not channels")
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return system.block(node, "an outer product of channels")
    kept = left if isinstance(left, Tensor) else right
    if isinstance(kept, Identity):
        return kept
    system.cut(kept, -1 if _varies(kept, -1) else -2)
    return kept.view(*[1] * (node.meta["val"].dim() - kept.dim()), *kept.shape)


def _varies(layout: Layout, axis: int) -> bool:
    """Whether channels lie along `axis`."""
    return isinstance(layout, Tensor) and layout.shape[axis] > 1


def embedding(system: System, node: fx.Node) -> Layouts:
    """A row of the table is written; its rows keep their order."""
    layouts = system.constant(node.args[0], (1,))
    if layouts is None:
        return system.block(node, _why_no_constant(node.args[0], "table"))
    result = layouts[0].reshape(-1).view(*[1] * (node.meta["val"].dim() - 1), -1)
    system.writes.append((node, result))
    return result


def rms_norm(system: System, node: fx.Node) -> Layouts:
    """Without a gain it commutes with orthogonal maps; its gain absorbs a diagonal on its result."""
    x, weight, _, offset = (*node.args, 0.0)[:4]
    return normalize(system, node, system.channels(x, -1, node), weight, offset)  # type: ignore[arg-type]


def add_rms_norm(system: System, node: fx.Node) -> Layouts:
    """The sum, and its norm."""
    x, residual, weight, _, offset = (*node.args, 0.0)[:5]
    total = system.channels(x, -1, node)  # type: ignore[arg-type]
    system.tie(total, system.channels(residual, -1, node), node)  # type: ignore[arg-type]
    return total, normalize(system, node, total, weight, offset)  # type: ignore[arg-type]


def normalize(system: System, node: fx.Node, x: Tensor, weight: fx.Node | None, offset: float) -> Layout:
    """The layout of `x / rms(x) · (offset + weight)`."""
    system.cut(x, -1)
    if system.kind is Kind.ORTHOGONAL and weight is None:
        return x
    if system.kind is Kind.SIGN:
        return x
    if system.kind is Kind.PERMUTATION:
        return with_gain(system, node, x, weight, offset)
    if system.kind is Kind.DIAGONAL and weight is not None:
        system.pin(x, Identity(node.name, "the RMS weighs all channels alike"))
        return with_gain(system, node, None, weight, offset)
    reason = {
        Kind.DIAGONAL: "the RMS weighs all channels alike and there is no gain",
        Kind.ORTHOGONAL: "its gain does not commute with rotations: fold it into what reads the norm",
    }.get(system.kind, "the RMS is kept by orthogonal maps only")
    return _stopped(system, node, x, reason)


def layer_norm(system: System, node: fx.Node) -> Layouts:
    """The mean makes it keep permutations only; gain and bias absorb a diagonal on the result."""
    x, shape, weight, bias = (*node.args, None, None)[:4]
    if len(shape) != 1:  # type: ignore[arg-type]
        return system.block(node, "normalizes over more than one axis")
    channels = system.channels(x, -1, node)  # type: ignore[arg-type]
    system.cut(channels, -1)
    if system.kind is Kind.PERMUTATION:
        return with_gain(system, node, channels, weight, 0.0, bias)  # type: ignore[arg-type]
    if system.kind is Kind.DIAGONAL and isinstance(weight, fx.Node):
        system.pin(channels, Identity(node.name, "the variance weighs all channels alike"))
        return with_gain(system, node, None, weight, 0.0, bias)  # type: ignore[arg-type]
    return _stopped(system, node, channels, "the mean that it subtracts is kept by permutations only: centre what writes the space")


def with_gain(
    system: System, node: fx.Node, x: Tensor | None, weight: fx.Node | None, offset: float, bias: fx.Node | None = None
) -> Layout:
    """Gain and bias follow the result, which follows x unless the gain makes a space of its own (x None)."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    result = x
    for vector in (weight, bias):
        if vector is None:
            continue
        layouts = system.constant(vector, (vector.meta["val"].dim() - 1,))
        if layouts is None:
            why = Identity(node.name, "its gain is computed, not a constant")
            for layout in (x, system.value(vector)):
                system.pin(layout if layout is not None else why, why)
            return why
        view = system.constant_view(vector)
        if offset and view is not None:
            system.offsets[MemberKey(view[0], view[1][-1])] = offset
        laid = layouts[0].reshape(-1).view(*[1] * (rank - 1), -1)
        if result is None:
            result = laid
        system.tie(result, laid, node)
    assert result is not None
    return result


def _stopped(system: System, node: fx.Node, x: Tensor, reason: str) -> Layout:
    """Neither operand nor result may change."""
    why = Identity(node.name, reason)
    system.pin(x, why)
    return why


def hadamard(system: System, node: fx.Node) -> Layouts:
    """A rotation that runs mixes the channels of a block: what goes in as T comes out as `H T Hᵀ`.

    One factor for a whole block would come out as it went in; no pass has a use for it.
    """
    channels = system.channels(node.args[0], -1, node)  # type: ignore[arg-type]
    return _stopped(system, node, channels, "mixes channels while the graph runs: a map would come out as another")


def dequantize(system: System, node: fx.Node) -> Layouts:
    """Codes and their scales keep what they were rounded in."""
    del system
    return Identity(node.name, "is quantized")


def rotary_table(system: System, node: fx.Node) -> Layouts:
    """Planes may be put in another order, by their frequencies; each plane is a channel and its partner in the other half."""
    layouts = system.constant(node.args[1], (0,)) if system.kind is Kind.PERMUTATION else None
    if layouts is None:
        why = Identity(node.name, "is a table of positions")
        return why, why
    rank = node.meta["val"][0].dim()
    table = torch.cat((layouts[0], layouts[0])).view(*[1] * (rank - 1), -1)
    return table, table


def rope(system: System, node: fx.Node) -> Layouts:
    """It passes what commutes with its planes: diagonals equal on both halves, planes in another order with their table."""
    x, cos, sin = node.args
    channels = system.channels(x, -1, node)  # type: ignore[arg-type]
    if system.kind in (Kind.ORTHOGONAL, Kind.INVERTIBLE):
        return _stopped(system, node, channels, "rotary positions turn fixed planes: act after them")
    low, high = channels.chunk(2, dim=-1)
    system.cut(low, -1)
    system.cut(high, -1)
    system.tie(low, high, node)
    if system.kind is Kind.PERMUTATION:
        for table in (cos, sin):
            layout = system.channels(table, -1, node)  # type: ignore[arg-type]
            system.tie(channels, layout.unsqueeze(1), node)
    return channels


def attention(system: System, node: fx.Node) -> Layouts:
    """Queries and keys share a map per key/value head, as duals; what is mixed from the values keeps their map."""
    q, k, v = node.args[:3]
    heads = node.meta["val"].shape[1]
    laid = []
    for operand in (q, k, v):
        layout = system.channels(operand, -1, node)  # type: ignore[arg-type]
        layout = collapse(system, layout, 2, node)
        system.cut(layout, -1)
        own = layout.shape[1]
        laid.append(layout.repeat_interleave(heads // own, dim=1) if own > 1 else layout)
    system.tie(laid[0], dual(laid[1]), node)
    return laid[2]


def cache_append(system: System, node: fx.Node) -> Layouts:
    """What is appended lives in the basis of what is stored."""
    keys, values, k, v = node.args[:4]
    for stored, new in ((keys, k), (values, v)):
        system.tie(system.value(new), system.value(stored), node)
    return system.value(keys), system.value(values)


def moe_experts(system: System, node: fx.Node) -> Layouts:
    """Experts read one space and write one; the hidden channels of each are its own, like those of a gated feed-forward layer."""
    x, _, weights, gate_up, down, activation = node.args
    first = system.constant(gate_up, (1, 2), outer={1: (0,)})
    second = system.constant(down, (1, 2), outer={2: (0,)})
    if first is None or second is None:
        return system.block(node, "its weights are computed, not constants")
    (inner, outside), (result, hidden) = first, second
    system.pin(system.value(weights), Identity(node.name, "weighs the experts"))
    channels = system.channels(x, -1, node)  # type: ignore[arg-type]
    system.tie(channels, dual(outside.reshape(-1)), node)
    system.reads.append((node, channels))
    gate, up = inner.squeeze(-1).chunk(2, dim=1)
    product = gated(system, node, gate, up, str(activation))
    system.tie(product, dual(hidden.squeeze(1)), node)
    system.writes.append((node, inner))
    system.reads.append((node, hidden))
    result = result.reshape(-1).view(*[1] * (node.meta["val"].dim() - 1), -1)
    system.writes.append((node, result))
    return result


def gated(system: System, node: fx.Node, gate: Layout, up: Layout, activation: str) -> Layout:
    """`activation(gate) · up`: a permutation of both is one of the product, a diagonal only passes on the linear side."""
    del activation
    if system.kind is Kind.PERMUTATION:
        system.tie(gate, up, node)
        return up
    system.pin(gate, Identity(node.name, "the gate goes through a nonlinearity"))
    if system.kind in (Kind.DIAGONAL, Kind.SIGN):
        return up
    why = Identity(node.name, "a product of two branches is taken channel by channel")
    system.pin(up, why)
    return why


def gated_activation(system: System, node: fx.Node) -> Layouts:
    """See `gated`."""
    gate, up, activation = node.args
    return gated(system, node, system.value(gate), system.value(up), str(activation))


DEFAULT_RULES: dict[Any, Rule] = {
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: addmm,
    aten.embedding.default: embedding,
    aten.layer_norm.default: layer_norm,
    qcompile.rms_norm.default: rms_norm,
    qcompile.add_rms_norm.default: add_rms_norm,
    qcompile.hadamard.default: hadamard,
    qcompile.dequantize.default: dequantize,
    qcompile.rotary_table.default: rotary_table,
    qcompile.rope.default: rope,
    qcompile.attention.default: attention,
    qcompile.cache_attend.default: attention,
    qcompile.cache_append.default: cache_append,
    qcompile.moe_experts.default: moe_experts,
    qcompile.gated_activation.default: gated_activation,
    **CONVOLUTION_RULES,
    **ELEMENTWISE_RULES,
    **SHAPE_RULES,
}
"""Operator -> rule. `find_spaces(graph, kind, rules=DEFAULT_RULES | {my_operator: my_rule})` teaches it a new one."""
