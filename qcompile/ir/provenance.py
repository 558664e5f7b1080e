"""Where nodes come from: which operators of the traced model each one descends from, whatever replaced them.

`meta["origins"]` of a node holds them as `module: operator name`, such as `model.layers.0.mlp: aten.mul.Tensor mul_19`. A node that takes
another's place takes over its origins, and those of what only the other one read: after a fusion they are those of all it fused.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

_MOST_HEIRS = 4
"""What more nodes than this read before they were replaced, such as a mask shared by all layers, is part of none of them."""


def origins(node: fx.Node) -> tuple[str, ...]:
    """The traced operators that `node` descends from."""
    found: tuple[str, ...] = node.meta.get("origins", ())
    return found


def inherit(heir: fx.Node, names: Iterable[str]) -> None:
    """Add to the origins of a node; a part of a tuple shares its own with the call that made it."""
    heir.meta["origins"] = tuple(dict.fromkeys((*origins(heir), *names)))
    if heir.target is operator.getitem and isinstance(heir.args[0], fx.Node):
        inherit(heir.args[0], names)


class Heirs:
    """Who takes over what, between the replacing of a node and the removing of what it alone had read."""

    def __init__(self) -> None:
        self._readers: dict[fx.Node, dict[fx.Node, None]] = {}
        self._successors: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def replaced(self, node: fx.Node, replacement: fx.Node) -> None:
        """Note that `replacement` takes the place of `node`; called while `node` still has its arguments."""
        inherit(replacement, origins(node))
        self._pass_on(node, (replacement,))
        earlier = self._readers.pop(node, {})  # whoever took the place of readers of `node` has as good as read its replacement
        self._readers.setdefault(replacement, {}).update((heir, None) for heir in earlier if heir is not replacement)

    def removed(self, node: fx.Node) -> None:
        """Note that nobody reads `node` any more: its origins, and what it read, pass to whoever replaced its readers."""
        heirs = dict.fromkeys(last for heir in self._readers.pop(node, {}) for last in self._living(heir))
        if heirs and len(heirs) <= _MOST_HEIRS:
            for heir in heirs:
                inherit(heir, origins(node))
            self._pass_on(node, tuple(heirs))

    def _pass_on(self, node: fx.Node, heirs: tuple[fx.Node, ...]) -> None:
        self._successors[node] = tuple(heir for heir in heirs if heir is not node)
        for used in node.all_input_nodes:
            self._readers.setdefault(used, {}).update(dict.fromkeys(heir for heir in heirs if heir is not used))

    def _living(self, node: fx.Node) -> list[fx.Node]:
        """The node, or whoever stands in its place by now."""
        if node not in self._successors:
            return [node]
        return [last for heir in self._successors[node] for last in self._living(heir)]
