"""Rules of what is computed channel by channel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.basis import Kind
from qcompile.passes.space_system import Identity, Layout, Layouts, Rule, System, dual

aten = torch.ops.aten

_SCALING = (Kind.SIGN, Kind.DIAGONAL)
_ANY = tuple(Kind)


def elementwise(system: System, node: fx.Node, *, kinds: tuple[Kind, ...] = (Kind.PERMUTATION,)) -> Layouts:
    """A function of each channel by itself: it keeps permutations, and whatever else it commutes with."""
    layout = system.value(node.args[0])
    if isinstance(layout, Identity) or system.kind in kinds:
        return layout
    return _stop(system, Identity(node.name, f"a nonlinearity, taken channel by channel, keeps no {system.kind.value} map"), layout)


def even(system: System, node: fx.Node) -> Layouts:
    """A function that sees no sign keeps positive scales if it is a magnitude; whatever sign its operand has, its result is the same."""
    if system.kind is Kind.SIGN:
        return Identity(node.name, "sees no signs")
    return elementwise(system, node, kinds=(Kind.PERMUTATION, Kind.DIAGONAL))


def cast(system: System, node: fx.Node) -> Layouts:
    """Another float dtype holds the same channels."""
    if node.meta["val"].is_floating_point():
        return system.value(node.args[0])
    return system.block(node, "rounds to integers")


def add(system: System, node: fx.Node) -> Layouts:
    """Both terms live in one space; a term that is the same for all channels keeps permutations only."""
    one, other, spread = _operands(system, node)
    if other is None or not spread:
        if isinstance(one, Identity) or system.kind is Kind.PERMUTATION:
            return one
        return _stop(system, Identity(node.name, "adds one number to all channels"), one, other)
    system.tie(one, other, node)
    return _wider(one, other)


def multiply(system: System, node: fx.Node) -> Layouts:
    """A factor for all channels alike keeps any map; a constant vector makes room for a diagonal; two branches share an order."""
    vector = _vector(system, node) if system.kind in _SCALING else None
    if vector is not None:
        return vector
    one, other, spread = _operands(system, node)
    if other is None:
        return one
    if not spread:
        system.pin(other, Identity(node.name, "scales all channels of the other factor"))
        return one
    if system.kind is Kind.PERMUTATION:
        system.tie(one, other, node)
        return _wider(one, other)
    if system.kind not in _SCALING or node.args[0] is node.args[1]:
        return _stop(system, Identity(node.name, "a product of two branches is taken channel by channel"), one, other)
    fixed, free = (one, other) if system.is_pinned(one) or not system.is_pinned(other) else (other, one)
    system.pin(fixed, Identity(node.name, "of two factors, the scale of one goes through the product"))
    return free


def divide(system: System, node: fx.Node) -> Layouts:
    """Like a product in the numerator; a denominator keeps an order of the channels, a constant one also makes room for a diagonal."""
    numerator, denominator = node.args[:2]
    if system.kind is Kind.PERMUTATION or not isinstance(denominator, fx.Node):
        return multiply(system, node)
    vector = _vector(system, node, inverse=True) if system.kind in _SCALING else None
    if vector is not None:
        return vector
    one, other, spread = _operands(system, node)
    if isinstance(numerator, fx.Node) and not spread and isinstance(one, Tensor) and _narrow_along(denominator, one):
        return multiply(system, node)
    return _stop(system, Identity(node.name, "divides channel by channel"), one, other)


def masked_fill(system: System, node: fx.Node) -> Layouts:
    """Zeros for whole rows keep any map, other numbers an order of the channels; a mask over channels keeps nothing."""
    x, mask, value = node.args[:3]
    layout = system.value(x)
    assert isinstance(mask, fx.Node)
    if isinstance(layout, Identity) or (_narrow_along(mask, layout) and (system.kind is Kind.PERMUTATION or value == 0)):
        return layout
    return system.block(node, "fills some channels with a number")


def softmax(system: System, node: fx.Node) -> Layouts:
    """It keeps an order of what it sums over."""
    layout = system.value(node.args[0])
    if isinstance(layout, Tensor):
        system.cut(layout, int(node.args[1]))  # type: ignore[arg-type]
    return elementwise(system, node)


def _operands(system: System, node: fx.Node) -> tuple[Layout, Layout | None, bool]:
    """The layouts of both operands in the rank of the result, and whether the second varies along the channels of the first.

    A number has no layout. The first is the one with channels, if only one varies along them.
    """
    nodes = [argument for argument in node.args[:2] if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], Tensor)]
    if len(nodes) == 1:
        return system.value(nodes[0]), None, False
    hint = next((system.value(item) for item in nodes if system.constant_view(item) is None), None)
    one, other = (_ranked(_laid(system, item, hint), node) for item in nodes)
    if isinstance(one, Tensor) and _narrow_along(nodes[1], one):
        return one, other, False
    if isinstance(other, Tensor) and _narrow_along(nodes[0], other):
        return other, one, False
    return one, other, True


def _laid(system: System, item: fx.Node, hint: Layout | None) -> Layout:
    """The layout of an operand; a constant follows the axes that the other operand's channels lie along."""
    if system.constant_view(item) is None or not isinstance(hint, Tensor):
        return system.value(item)
    axes = _channel_axes(item, hint)
    layouts = system.constant(item, axes[-1:], outer={axes[-1]: axes[:-1]}) if axes else None
    return layouts[0] if layouts is not None else system.value(item)


def _channel_axes(item: fx.Node, layout: Tensor) -> list[int]:
    """The axes of a constant operand that lie under the full axes of `layout` and are no broadcast."""
    shape = item.meta["val"].shape
    shift = layout.dim() - len(shape)
    return [axis for axis in range(len(shape)) if axis + shift >= 0 and layout.shape[axis + shift] > 1 and _is_wide(shape[axis])]


def _vector(system: System, node: fx.Node, *, inverse: bool = False) -> Layouts | None:
    """A constant vector between two spaces: it takes the map of its result and gives back that of its operand."""
    constants = [item for item in node.args[:2] if system.constant_view(item) is not None]
    others = [item for item in node.args[:2] if item not in constants]
    if len(constants) != 1 or len(others) != 1 or (inverse and constants[0] is not node.args[1]):
        return None
    layout = system.value(others[0])
    if isinstance(layout, Identity):
        return None
    axes = _channel_axes(constants[0], layout)  # type: ignore[arg-type]
    layouts = system.constant(constants[0], axes[-1:], outer={axes[-1]: axes[:-1]}, sides=("", "operand")) if axes else None
    if layouts is None:
        return None
    written, read = (_ranked(item, node) for item in layouts)
    system.tie(read, layout if inverse else dual(layout), node)
    return dual(written) if inverse else written


def _ranked(layout: Layout, node: fx.Node) -> Layout:
    """With leading axes up to the rank of the result."""
    rank = node.meta["val"].dim()
    return layout if isinstance(layout, Identity) else layout.reshape(*[1] * (rank - layout.dim()), *layout.shape)


def _narrow_along(item: fx.Node, layout: Tensor) -> bool:
    """Whether a tensor is broadcast along every full axis of `layout`."""
    shape = item.meta["val"].shape
    shift = layout.dim() - len(shape)
    full = [axis for axis in range(layout.dim()) if layout.shape[axis] > 1]
    return bool(full) and all(axis < shift or not _is_wide(shape[axis - shift]) for axis in full)


def _is_wide(size: object) -> bool:
    """Whether an axis has more than one entry; a symbolic one may."""
    return not isinstance(size, int) or size > 1


def _wider(one: Layout, other: Layout) -> Layout:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.expand(torch.broadcast_shapes(one.shape, other.shape))  # type: ignore[no-untyped-call]
    return one if isinstance(one, Identity) else other


def _stop(system: System, why: Identity, *layouts: Layout | None) -> Identity:
    for layout in layouts:
        if layout is not None:
            system.pin(layout, why)
    return why


_positive: Rule = partial(elementwise, kinds=(Kind.PERMUTATION, Kind.DIAGONAL))
_odd: Rule = partial(elementwise, kinds=(Kind.PERMUTATION, Kind.SIGN))
_linear: Rule = partial(elementwise, kinds=_ANY)

ELEMENTWISE_RULES: dict[Any, Rule] = {
    **dict.fromkeys((
        aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.hardswish.default, aten.relu6.default,
        aten.hardtanh.default, aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.softplus.default,
        aten.mish.default, aten.elu.default, aten.selu.default, aten.cos.default, aten.pow.Tensor_Scalar, aten.square.default,
        aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.reciprocal.default,
    ), elementwise),
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default), _positive),
    aten.abs.default: even,
    **dict.fromkeys((aten.tanh.default, aten.erf.default, aten.sin.default), _odd),
    **dict.fromkeys((aten.neg.default,), _linear),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar), add),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), multiply),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor), divide),
    **dict.fromkeys((aten.softmax.int, aten.log_softmax.int), softmax),
    aten.masked_fill.Scalar: masked_fill,
    aten.to.dtype: cast,
}  # fmt: skip
"""Operators that mix no channels."""
