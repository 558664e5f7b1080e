"""Rules of what moves, selects, joins or reduces channels: the operator is done to the layout as it is done to the value."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.basis import Kind
from qcompile.passes.space_system import Identity, Layouts, Rule, System

aten = torch.ops.aten

_UNKNOWN_CHANNELS = "takes channels by a number that is only known at run time"
_PRIMES = (1_000_003, 999_983, 999_979, 999_961, 999_959, 999_953)
"""Stand for symbolic sizes: products of axes then agree only where they agree for every size."""


def collapse(system: System, layout: Tensor, axis: int, by: fx.Node) -> Tensor:
    """The layout with one map for all indices of `axis`: what an operator that does not tell them apart asks for."""
    if layout.shape[axis] == 1:
        return layout
    first = layout.narrow(axis, 0, 1)
    system.tie(layout, first, by)
    return first


def reshape(system: System, node: fx.Node) -> Layouts:
    """Axes that split or join take their channels along; where channels join a symbolic axis, all its indices share one map."""
    x = node.args[0]
    layout = system.value(x)
    if isinstance(layout, Identity):
        return layout
    known: dict[str, int] = {}
    before, after = (_sizes(item, known) for item in (x, node))
    shape: list[int] = []
    for inside, outside in _groups(before, after):
        full = [axis for axis in inside if layout.shape[axis] > 1]
        if full and all(isinstance(x.meta["val"].shape[axis], int) for axis in inside):  # type: ignore[union-attr]
            layout = layout.expand(*[before[axis] if axis in inside else -1 for axis in range(layout.dim())])
            shape += [after[axis] for axis in outside]
            continue
        for axis in full:
            layout = collapse(system, layout, axis, node)
        shape += [1] * len(outside)
    return layout.reshape(shape)


def layout_size(layout: Tensor, axes: Sequence[int]) -> int:
    """Entries of a layout along some axes."""
    return math.prod(layout.shape[axis] for axis in axes)


def _sizes(node: object, known: dict[str, int]) -> list[int]:
    """The shape with a prime for each symbol."""
    assert isinstance(node, fx.Node)
    return [size if isinstance(size, int) else _number(size.node.expr, known) for size in node.meta["val"].shape]


def _number(expression: Any, known: dict[str, int]) -> int:
    for symbol in sorted(expression.free_symbols, key=str):
        known.setdefault(str(symbol), _PRIMES[len(known) % len(_PRIMES)])
    return int(expression.subs({symbol: known[str(symbol)] for symbol in expression.free_symbols}))


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of runs of axes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        inside, outside = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        left, right = math.prod(before[axis] for axis in inside), math.prod(after[axis] for axis in outside)
        i, j = i + len(inside), j + len(outside)
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
                inside.append(i - 1)
            else:
                right, j = right * after[j], j + 1
                outside.append(j - 1)
        groups.append((inside, outside))
    return groups


def expand(system: System, node: fx.Node) -> Layouts:
    """What is repeated along an axis is the same there; new axes come first."""
    layout = system.value(node.args[0])
    if isinstance(layout, Identity):
        return layout
    return layout.reshape(*[1] * (node.meta["val"].dim() - layout.dim()), *layout.shape)


def rearrange(system: System, node: fx.Node) -> Layouts:
    """Transpose and its kin, done to the layout."""
    layout = system.value(node.args[0])
    if isinstance(layout, Identity):
        return layout
    result: Tensor = node.target(layout, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return result


def along(system: System, node: fx.Node) -> Layouts:
    """Select, slice or repeat along one axis: done to the layout where channels lie there, else the layout stays."""
    layout = system.value(node.args[0])
    results = node.meta["val"]
    if isinstance(layout, Identity):
        return tuple(layout for _ in results) if isinstance(results, list | tuple) else layout
    axis = _axis(node) % layout.dim()
    if layout.shape[axis] > 1:
        if any(isinstance(argument, fx.Node) for argument in node.args[1:]):
            return system.block(node, _UNKNOWN_CHANNELS)
        made = node.target(layout, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return tuple(made) if isinstance(made, list | tuple) else made
    loses = node.target in (aten.select.int, aten.unbind.int)
    kept = layout.squeeze(axis) if loses else layout
    return tuple(kept for _ in results) if isinstance(results, list | tuple) else kept


_AXIS_ARGUMENT = {
    aten.select.int: 1, aten.slice.Tensor: 1, aten.narrow.default: 1, aten.chunk.default: 2, aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2, aten.unbind.int: 1, aten.repeat_interleave.self_int: 2, aten.tensor_split.sections: 2,
}  # fmt: skip


def _axis(node: fx.Node) -> int:
    place = _AXIS_ARGUMENT[node.target]  # type: ignore[index]
    value = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    assert isinstance(value, int)
    return value


def index(system: System, node: fx.Node) -> Layouts:
    """A constant list of channels is taken from the layout; rows may be taken by anything."""
    x, indices = node.args[0], node.args[1]
    layout = system.value(x)
    if isinstance(layout, Identity):
        return layout
    assert isinstance(indices, list | tuple)
    places = [axis for axis, item in enumerate(indices) if item is not None]
    if len(places) != 1:
        return system.block(node, "takes from several axes at once")
    axis, which = places[0], indices[places[0]]
    assert isinstance(which, fx.Node)
    if layout.shape[axis] == 1:
        return layout.reshape(*layout.shape[:axis], *[1] * which.meta["val"].dim(), *layout.shape[axis + 1 :])
    chosen = _known_numbers(system, which)
    if chosen is None:
        return system.block(node, _UNKNOWN_CHANNELS)
    picked: Tensor = aten.index.Tensor(layout, [*[None] * axis, chosen])
    return picked


def index_select(system: System, node: fx.Node) -> Layouts:
    """A constant order of channels, or a part of them, is taken from the layout; rows may be taken by anything."""
    x, axis, which = node.args[:3]
    layout = system.value(x)
    assert isinstance(axis, int)
    if isinstance(layout, Identity) or layout.shape[axis] == 1:
        return layout
    chosen = _known_numbers(system, which)
    return system.block(node, _UNKNOWN_CHANNELS) if chosen is None else layout.index_select(axis, chosen.reshape(-1))


def _known_numbers(system: System, which: object) -> Tensor | None:
    """The indices that a constant holds as int64, or None for what is computed."""
    constant = system.graph.constant(which) if isinstance(which, fx.Node) else None
    known = constant is not None and constant.is_bound and constant.dtype in (torch.int32, torch.int64)
    return constant.materialize().long() if known and constant is not None else None


def gather_last(system: System, node: fx.Node) -> Layouts:
    """One row of each sequence."""
    layout = system.value(node.args[0])
    return layout if isinstance(layout, Identity) else collapse(system, layout, 1, node)


def cat(system: System, node: fx.Node) -> Layouts:
    """Joined channels stand side by side; joined rows share one space."""
    parts = [part for part in node.args[0] if part.meta["val"].shape[-1] != 0 and 0 not in part.meta["val"].shape]  # type: ignore[union-attr]
    rank = node.meta["val"].dim()
    axis = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[arg-type]
    layouts = [system.value(part) for part in parts]
    real = [layout for layout in layouts if isinstance(layout, Tensor)]
    if any(layout.shape[axis] > 1 for layout in real):
        joined = [system.channels(part, axis, node) for part in parts]  # type: ignore[arg-type]
        others = torch.broadcast_shapes(*(_without(layout, axis) for layout in joined))  # type: ignore[no-untyped-call]
        return torch.cat([layout.expand(*others[:axis], layout.shape[axis], *others[axis + 1 :]) for layout in joined], dim=axis)
    for layout in layouts[1:]:
        system.tie(layouts[0], layout, node)
    return real[0] if len(real) == len(layouts) else next(layout for layout in layouts if isinstance(layout, Identity))


def _without(layout: Tensor, axis: int) -> tuple[int, ...]:
    return (*layout.shape[:axis], 1, *layout.shape[axis + 1 :])


def getitem(system: System, node: fx.Node) -> Layouts:
    """One of several results."""
    layouts = system.layouts[node.args[0]]  # type: ignore[index]
    return layouts[node.args[1]] if isinstance(layouts, tuple) else layouts  # type: ignore[index]


def reduce(system: System, node: fx.Node) -> Layouts:
    """A mean or sum over rows keeps any map, over all channels only their order; a maximum of rows also positive diagonals."""
    layout = system.value(node.args[0])
    if isinstance(layout, Identity):
        return layout
    linear = node.target in (aten.mean.dim, aten.sum.dim_IntList)
    dims: Any = node.args[1] if len(node.args) > 1 and node.args[1] is not None else list(range(layout.dim()))
    axes = sorted({axis % layout.dim() for axis in ([dims] if isinstance(dims, int) else dims)})
    keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    over = [axis for axis in axes if layout.shape[axis] > 1]
    if system.kind is not Kind.PERMUTATION and (over or not (linear or system.kind is Kind.DIAGONAL)):
        return system.block(node, "reduces channels" if over else "a maximum is taken channel by channel")
    if len(over) > 1:
        return system.block(node, "reduces several axes of channels")
    for axis in over:
        system.cut(layout, axis)
        if layout_size(layout, range(layout.dim())) == layout.shape[axis]:
            return Identity(node.name, "has reduced the channels")
        return system.block(node, "reduces one of several axes of channels")
    return layout if keep else layout.reshape([size for axis, size in enumerate(layout.shape) if axis not in axes])


SHAPE_RULES: dict[Any, Rule] = {
    **dict.fromkeys((
        aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default,
    ), reshape),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int), rearrange),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), expand),
    **dict.fromkeys(tuple(_AXIS_ARGUMENT), along),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default), reduce),
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default), expand),
    aten.index.Tensor: index,
    aten.index_select.default: index_select,
    aten.cat.default: cat,
    operator.getitem: getitem,
    torch.ops.qcompile.gather_last.default: gather_last,
}  # fmt: skip
"""Operators that compute nothing, or reduce."""
