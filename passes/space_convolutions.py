"""Rules of what works on channels over space: axis 1 holds the channels, the axes behind it hold none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.basis import Kind
from qcompile.passes.space_system import Identity, Layouts, Rule, System, dual

aten = torch.ops.aten


def convolution(system: System, node: fx.Node) -> Layouts:
    """At each tap a linear over channels: it reads one space and writes another, group by group."""
    x, weight, bias, _, _, _, groups = (*node.args, *(None, 1, 0, 1, 1)[len(node.args) - 2 :])[:7]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if system.constant_view(weight) is None:
        return system.block(node, "its weight is computed, not a constant")
    channels = _over_space(system, x, node)
    per_group = weight.meta["val"].shape[1]
    if groups == 1:
        rows, columns = system.constant(weight, (0, 1))  # type: ignore[misc]
        system.tie(channels.reshape(-1), dual(columns.reshape(-1)), node)
        system.reads.append((node, channels))
        written = rows.reshape(-1)
    elif per_group == 1:
        written = _depthwise(system, node, channels.reshape(-1), weight)
    else:
        written = _grouped(system, node, channels.reshape(int(groups), -1), weight)  # type: ignore[arg-type]
    result = _stand(written, node)
    system.writes.append((node, result))
    if isinstance(bias, fx.Node):
        system.tie(written, system.value(bias), node)
    return result


def _depthwise(system: System, node: fx.Node, channels: Tensor, weight: fx.Node) -> Tensor:
    """One filter or more for each channel: what is written keeps the order of what is read, with a scale of its own."""
    read = channels.repeat_interleave(weight.meta["val"].shape[0] // channels.numel())
    system.reads.append((node, channels))
    if system.kind in (Kind.DIAGONAL, Kind.SIGN):
        written, undone = system.constant(weight, (0,), sides=("", "operand"))  # type: ignore[misc]
        system.tie(undone.reshape(-1), dual(read), node)
        return written.reshape(-1)
    if system.kind is Kind.PERMUTATION:
        (rows,) = system.constant(weight, (0,))  # type: ignore[misc]
        system.tie(rows.reshape(-1), read, node)
        return rows.reshape(-1)
    written = system.constant(weight, (0,))[0].reshape(-1)  # type: ignore[index]
    why = Identity(node.name, "a depthwise convolution mixes no channels")
    system.pin(channels, why)
    system.pin(written, why)
    return written


def _grouped(system: System, node: fx.Node, channels: Tensor, weight: fx.Node) -> Tensor:
    """Each group reads its own channels and writes its own."""
    rows, columns = system.constant(weight, (0, 1), outer={1: (0,)})  # type: ignore[misc]
    groups, outputs = channels.shape[0], rows.numel()
    system.cut(channels, -1)
    system.cut(rows.reshape(groups, -1), -1)
    read = channels.repeat_interleave(outputs // groups, dim=0)
    system.tie(columns.reshape(read.shape), dual(read), node)
    system.reads.append((node, channels))
    return rows.reshape(-1)


def batch_norm(system: System, node: fx.Node) -> Layouts:
    """A scale and a shift of each channel: it keeps their order, and makes room for a diagonal."""
    x, *vectors = node.args[:5]
    training = node.args[5] if node.target is aten.batch_norm.default else False
    assert isinstance(x, fx.Node)
    if training or system.kind not in (Kind.PERMUTATION, Kind.DIAGONAL):
        return system.block(node, "scales each channel by itself" if not training else "takes its statistics from the batch")
    channels = _over_space(system, x, node).reshape(-1)
    weight, bias, mean, variance = vectors
    if system.kind is Kind.PERMUTATION:
        for vector in vectors:
            if isinstance(vector, fx.Node):
                system.tie(channels, system.value(vector), node)
        return _stand(channels, node)
    layouts = system.constant(weight, (0,), sides=("", "operand"))
    if layouts is None:
        return system.block(node, "has no constant gain to take a scale")
    written, undone = layouts
    system.tie(undone, dual(channels), node)
    system.constant(variance, ())
    for vector, layout in ((mean, channels), (bias, written)):
        if isinstance(vector, fx.Node):
            system.tie(layout, system.value(vector), node)
    return _stand(written, node)


def pool(system: System, node: fx.Node) -> Layouts:
    """A mean over space keeps any map, a maximum an order and positive scales."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    largest = node.target in (aten.max_pool1d.default, aten.max_pool2d.default)
    if largest and system.kind not in (Kind.PERMUTATION, Kind.DIAGONAL):
        return system.block(node, "a maximum is taken channel by channel")
    layout = system.value(x)
    return layout if isinstance(layout, Identity) else _over_space(system, x, node)


def pad(system: System, node: fx.Node) -> Layouts:
    """Zeros around the channels' maps keep any map."""
    x, sides = node.args[:2]
    zero = node.target is aten.constant_pad_nd.default and (len(node.args) < 3 or node.args[2] == 0)
    layout = system.value(x)
    if isinstance(layout, Identity):
        return layout
    untouched = layout.dim() - len(sides) // 2  # type: ignore[arg-type]
    return layout if zero and all(size == 1 for size in layout.shape[untouched:]) else system.block(node, "pads channels")


def _over_space(system: System, x: fx.Node, node: fx.Node) -> Tensor:
    """The layout [1, C, 1, …] of an operand [B, C, …]; one whose channels lie elsewhere is pinned."""
    layout = system.channels(x, 1, node)
    if layout.numel() == layout.shape[1]:
        return layout
    why = Identity(node.name, "acts over an axis that holds channels")
    system.pin(layout, why)
    return system.pinned(layout.dim(), 1, layout.shape[1], why)


def _stand(channels: Tensor, node: fx.Node) -> Tensor:
    """Channels [C] as the layout of the result."""
    return channels.reshape(1, -1, *[1] * (node.meta["val"].dim() - 2))


CONVOLUTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding), convolution),
    **dict.fromkeys((aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), batch_norm),
    **dict.fromkeys((
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool1d.default,
        aten.max_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    ), pool),
    aten.constant_pad_nd.default: pad,
}  # fmt: skip
"""Operators on [B, C, …]."""
