"""The constraints behind spaces: channels numbered, runs of them tied, cut and pinned, and the solution.

A layout says how a map acts on a tensor: an integer tensor of the same rank whose axes are 1 (the map acts alike along them) or full.
Each entry names a channel; two entries with the same number undergo the same map, a negative number its dual `T⁻ᵀ`. So slicing,
reshaping, transposing or repeating a value does the same to its layout, and a rule has only to say what may act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qcompile.ir.basis import Kind
from qcompile.ir.graph import Graph, operator_name

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Identity:
    """The layout of a value that nothing may act on: which node wants it so, and why."""

    node: str
    reason: str


Layout = Tensor | Identity
Layouts = Layout | tuple[Layout, ...]
Rule = Callable[["System", fx.Node], Layouts]


@dataclass(frozen=True)
class MemberKey:
    """A constant, one of its axes, and which of the maps along it: a vector between two spaces follows both."""

    name: str
    axis: int
    side: str = ""


@dataclass
class System:
    """What the rules of the operators say about one kind of map on one graph.

    Attributes:
        members: layout of each constant along each axis that something may act on.
        offsets: what is added to a gain before it is a gain.
        layouts: layout of each value.
        reads: linear-like nodes and the layout that they read.
        writes: linear-like nodes and the layout that they write.
    """

    graph: Graph
    kind: Kind
    members: dict[MemberKey, Tensor] = field(default_factory=dict)
    offsets: dict[MemberKey, float] = field(default_factory=dict)
    layouts: dict[fx.Node, Layouts] = field(default_factory=dict)
    reads: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    writes: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    ties: list[tuple[int, int, int, bool, str]] = field(default_factory=list)
    pins: list[tuple[int, int, Identity]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=lambda: [0])
    channels_made: int = 1
    _uses: list[tuple[str, frozenset[MemberKey], str]] = field(default_factory=list)
    _stand_ins: dict[tuple[fx.Node, int], Tensor] = field(default_factory=dict)
    _reader: str = ""

    # What rules are made of

    def value(self, argument: object) -> Layout:
        """The layout of an operand; that of a constant is along its last axis."""
        assert isinstance(argument, fx.Node)
        if self.constant_view(argument) is not None:
            last = argument.meta["val"].dim() - 1
            along = self.constant(argument, (last,)) if last >= 0 and argument.meta["val"].is_floating_point() else None
            return along[0] if along is not None else Identity(argument.name, "is no float vector")
        layout = self.layouts[argument]
        assert not isinstance(layout, tuple)
        return layout

    def channels(self, argument: fx.Node, axis: int, by: fx.Node) -> Tensor:
        """The layout of an operand that `by` contracts or normalizes along `axis`: full along that axis.

        Where nothing may act along it the channels are new ones, pinned for the reason the operand gives.
        """
        layout, shape = self.value(argument), argument.meta["val"].shape
        axis %= len(shape)
        if isinstance(layout, Tensor) and isinstance(shape[axis], int) and layout.shape[axis] == shape[axis]:
            return layout
        why = layout if isinstance(layout, Identity) else Identity(by.name, f"acts along axis {axis}, which holds no channels")
        self.pin(layout, why)
        if (argument, axis) not in self._stand_ins:
            self._stand_ins[argument, axis] = self.pinned(len(shape), axis, shape[axis], why)
        return self._stand_ins[argument, axis]

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """New channels, numbered along the last axis first."""
        count = int(np.prod(shape))
        start = self.channels_made
        self.channels_made = start + count + 1  # a gap: runs of two spaces never join
        self.cuts += [start, start + count]
        return torch.arange(start, start + count).view(tuple(shape))

    def pinned(self, rank: int, axis: int, size: object, why: Identity) -> Tensor:
        """New channels along `axis` of a value of `rank` axes that nothing may act on; a symbolic size counts as one channel."""
        shape = [1] * rank
        shape[axis] = size if isinstance(size, int) else 1
        layout = self.fresh(shape)
        self.pin(layout, why)
        return layout

    def constant(
        self, argument: object, axes: Sequence[int], *, outer: Mapping[int, Sequence[int]] | None = None, sides: Sequence[str] = ("",)
    ) -> list[Tensor] | None:
        """The layouts of a constant along each of `axes` (for each of `sides`), or None if it is computed.

        Whatever is not asked for here stays as it is: every other axis of the constant is pinned.

        Args:
            argument: the operand: a constant, perhaps transposed.
            axes: axes of the operand as the operator sees it.
            outer: for an axis, those along which each index has a map of its own (experts, groups, heads).
            sides: names of the maps that act along each axis.
        """
        view = self.constant_view(argument)
        if view is None:
            return None
        name, order = view
        keys = [(MemberKey(name, order[axis], side), (outer or {}).get(axis, ())) for axis in axes for side in sides]
        self._uses.append((name, frozenset(key for key, _ in keys), self._reader))
        return [self._member(key, [order[axis] for axis in beside]).permute(order) for key, beside in keys]

    def constant_view(self, argument: object) -> tuple[str, tuple[int, ...]] | None:
        """The constant behind an operand, looking through transposition: (name, its axis behind each axis of the operand)."""
        if not isinstance(argument, fx.Node):
            return None
        if argument.op == "get_attr":
            return str(argument.target), tuple(range(argument.meta["val"].dim()))
        order = _transposition(argument)
        behind = self.constant_view(argument.args[0]) if order is not None else None
        return None if behind is None or order is None else (behind[0], tuple(behind[1][axis] for axis in order))

    def tie(self, one: Layout, other: Layout, by: fx.Node) -> None:
        """The same map acts on both (broadcast against each other)."""
        if isinstance(one, Identity) or isinstance(other, Identity):
            why = one if isinstance(one, Identity) else other
            assert isinstance(why, Identity)
            self.pin(other if why is one else one, why)
            return
        a, b = (layout.reshape(-1).numpy() for layout in torch.broadcast_tensors(one, other))  # type: ignore[no-untyped-call]
        breaks = _breaks(a) | _breaks(b)
        for start, stop in _intervals(breaks):
            flipped = not self.kind.is_own_dual and bool((a[start] < 0) != (b[start] < 0))
            self.ties.append((abs(int(a[start])), abs(int(b[start])), stop - start, flipped, by.name))

    def cut(self, layout: Layout, axis: int) -> None:
        """Each row along `axis` is mapped by itself: nothing mixes rows."""
        if isinstance(layout, Identity):
            return
        rows = layout.movedim(axis, -1).contiguous()
        flat = rows.reshape(-1).numpy()
        breaks = _breaks(flat)
        breaks[rows.shape[-1] - 1 :: rows.shape[-1]] = True
        for start, stop in _intervals(breaks):
            self.cuts += [abs(int(flat[start])), abs(int(flat[start])) + stop - start]

    def pin(self, layout: Layout, why: Identity) -> None:
        """Nothing may act on these channels."""
        if isinstance(layout, Tensor):
            flat = np.unique(layout.abs().reshape(-1).numpy())
            self.pins += [(int(flat[start]), stop - start, why) for start, stop in _intervals(_breaks(flat))]

    def block(self, node: fx.Node, reason: str) -> Layouts:
        """Pin all that `node` reads; its result, too, stays as it is."""
        why = Identity(node.name, reason)
        for used in node.all_input_nodes:
            layout = self.value(used) if isinstance(used.meta.get("val"), Tensor) else self.layouts.get(used, why)
            for part in layout if isinstance(layout, tuple) else (layout,):
                self.pin(part, why)
        results = node.meta.get("val")
        return tuple(why for _ in results) if isinstance(results, list | tuple) else why

    def is_pinned(self, layout: Layout) -> bool:
        """Whether something has pinned just these channels already."""
        if isinstance(layout, Identity):
            return True
        first = abs(int(layout.reshape(-1)[0]))
        return any(start <= first < start + count for start, count, _ in self.pins)

    # Reading the graph

    def read(self, rules: Mapping[Any, Rule]) -> None:
        """Let the rule of each operator speak, in order."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.layouts[node] = Identity(node.name, "is an input of the graph")
            elif node.op == "call_function" and self.constant_view(node) is None:
                self._apply(node, rules)
            elif node.op == "output":
                self._reader = node.name
                for result in node.all_input_nodes:
                    if isinstance(result.meta.get("val"), Tensor):
                        self.pin(self.value(result), Identity(result.name, "is an output of the graph"))
        self._pin_other_readings()

    def _apply(self, node: fx.Node, rules: Mapping[Any, Rule]) -> None:
        seen, self._reader = len(self._uses), node.name
        rule = rules.get(node.target)
        if rule is not None:
            self.layouts[node] = rule(self, node)
        elif isinstance(node.meta.get("val"), Tensor | tuple | list):
            self.layouts[node] = self.block(node, f"operator {operator_name(node.target)} is unknown to the rules")
        used = {name for name, _, _ in self._uses[seen:]}
        for argument in node.all_input_nodes:
            view = self.constant_view(argument)
            if view is not None and view[0] not in used:
                self._uses.append((view[0], frozenset(), node.name))

    def _pin_other_readings(self) -> None:
        """A constant that is read in two ways keeps only what both allow."""
        keys: dict[str, list[MemberKey]] = {}
        for key in self.members:
            keys.setdefault(key.name, []).append(key)
        for name, asked, node in self._uses:
            for key in keys.get(name, ()):
                if key not in asked:
                    self.pin(self.members[key], Identity(node, f"reads {name} along other axes too"))

    def _member(self, key: MemberKey, outer: Sequence[int]) -> Tensor:
        """The one layout of a constant along an axis, in the constant's own order of axes."""
        if key not in self.members:
            shape = self.graph.constants[key.name].shape
            axes = [*outer, key.axis]
            made = self.fresh([shape[axis] for axis in axes])
            self.cut(made, -1)
            full = made.view(*made.shape, *[1] * (len(shape) - len(axes)))
            rest = [axis for axis in range(len(shape)) if axis not in axes]
            order = [*axes, *rest]
            self.members[key] = full.permute([order.index(axis) for axis in range(len(shape))])
        return self.members[key]


def _transposition(node: fx.Node) -> tuple[int, ...] | None:
    """The axis of its argument behind each axis of a transposition; None for other nodes."""
    aten = torch.ops.aten
    if node.op != "call_function" or node.target not in (aten.t.default, aten.transpose.int, aten.permute.default):
        return None
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return tuple(axis % rank for axis in node.args[1])  # type: ignore[union-attr]
    one, other = (0, 1) if node.target is aten.t.default else (node.args[1], node.args[2])
    if rank > 1:
        order[one], order[other] = order[other], order[one]  # type: ignore[index]
    return tuple(order)


def dual(layout: Layout) -> Layout:
    """What is paired with these channels in a product: it undergoes `T⁻ᵀ`."""
    return -layout if isinstance(layout, Tensor) else layout


def _breaks(flat: Array) -> NDArray[np.bool_]:
    """Where a run of consecutive channels ends: True at its last entry."""
    ends = np.ones(flat.shape, dtype=bool)
    magnitude = np.abs(flat)
    ends[:-1] = (magnitude[1:] != magnitude[:-1] + 1) | ((flat[1:] < 0) != (flat[:-1] < 0))
    return ends


def _intervals(ends: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run."""
    stops = np.flatnonzero(ends) + 1
    return zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True)
