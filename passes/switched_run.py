"""Runs a graph again and again with other quantizers switched off, and computes anew only what that changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qcompile.ir.graph import Graph
from qcompile.passes.execution import Inputs, call
from qcompile.passes.switches import Redirects

Off = frozenset[int]
"""Numbers of the switches that are off."""


@dataclass
class _Base:
    """A setting of the switches whose values are kept: what is read in place of what, and the values, by node and batch."""

    redirects: Mapping[fx.Node, fx.Node]
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)


@dataclass
class Room:
    """Bytes that may be kept: of weights as they are multiplied with, and of values at the start of layers."""

    weights: int = 6 << 30
    values: int = 2 << 30


class SwitchedRun:
    """One graph, its inputs, and what each switch redirects.

    Weights are dequantized once, as far as there is room. `keep` computes with one setting and keeps the values that are alive where a
    layer begins; `run` starts from the kept setting that leaves least to do: what stands before the first switched quantizer is not
    computed again.
    """

    def __init__(self, program: Graph, redirects: Sequence[Redirects], always: Redirects, inputs: Inputs, room: Room | None = None) -> None:
        """Prepare; `always` holds whatever the setting."""
        self._program, self._inputs, self._room = program, inputs, room or Room()
        nodes = {node.name: node for node in program.fx.nodes}
        self._redirects = [{nodes[on]: nodes[off] for on, off in pairs.items()} for pairs in redirects]
        self._always = {nodes[on]: nodes[off] for on, off in always.items()}
        self._order = program.nodes
        self._index = {node: index for index, node in enumerate(self._order)}
        self._static = self._static_nodes()
        outputs: Any = program.output.args[0]
        lm = program.interface.kind in ("causal_lm", "cached_lm")
        self._outputs: list[fx.Node] = list(outputs)[:1] if lm else list(outputs)
        self._weights: dict[fx.Node, Any] = {}
        self._bases: list[_Base] = []
        self.computed = 0
        """Calls computed so far, over all runs."""

    def keep(self, off: Off, cuts: Collection[str]) -> list[list[Tensor]]:
        """As `run`, and keep what is alive right before each node named in `cuts`."""
        redirects = self._setting(off)
        needed = self._needed(redirects, None, set())
        base = _Base(redirects)
        found = self._compute(needed, redirects, None, self._alive(needed, redirects, cuts), base.values)
        self._bases.append(base)
        return found

    def run(self, off: Off) -> list[list[Tensor]]:
        """The outputs of each batch (of a language model the logits alone) with these switches off and the others on."""
        redirects = self._setting(off)
        choices: list[tuple[list[fx.Node], _Base | None]] = [
            (self._needed(redirects, base, self._changed(redirects, base)), base) for base in self._bases
        ]
        needed, base = min(choices, key=lambda choice: len(choice[0])) if choices else (self._needed(redirects, None, set()), None)
        return self._compute(needed, redirects, base, set(), {})

    def _setting(self, off: Off) -> dict[fx.Node, fx.Node]:
        setting = dict(self._always)
        for number in off:
            setting |= self._redirects[number]
        return setting

    def _static_nodes(self) -> set[fx.Node]:
        """Constants, and what is computed from them alone and reads no quantizer: equal whatever is switched."""
        switched = {node for pairs in (*self._redirects, self._always) for node in pairs}
        static: set[fx.Node] = set()
        for node in self._order:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and all(used in static and used not in switched for used in inputs)):
                static.add(node)
        return static

    def _changed(self, redirects: Mapping[fx.Node, fx.Node], base: _Base) -> set[fx.Node]:
        """The calls whose values differ from those of the kept setting, as far as switches say."""
        changed: set[fx.Node] = set()
        for node in self._order:
            for used in node.all_input_nodes:
                read = redirects.get(used, used)
                if read is not base.redirects.get(used, used) or read in changed:
                    changed.add(node)
                    break
        return changed

    def _needed(self, redirects: Mapping[fx.Node, fx.Node], base: _Base | None, changed: set[fx.Node]) -> list[fx.Node]:
        """What must be computed for the outputs, in order."""
        found: set[fx.Node] = set()
        pending = [redirects.get(node, node) for node in self._outputs]
        while pending:
            node = pending.pop()
            known = base is not None and node in base.values and node not in changed
            if node in found or known or node in self._static or node.op != "call_function":
                continue
            found.add(node)
            pending += (redirects.get(used, used) for used in node.all_input_nodes)
        return sorted(found, key=self._index.__getitem__)

    def _alive(self, needed: Sequence[fx.Node], redirects: Mapping[fx.Node, fx.Node], cuts: Collection[str]) -> set[fx.Node]:
        """The calls before each cut that are read at or after it."""
        last: dict[fx.Node, int] = {}
        for node in needed:
            for used in node.all_input_nodes:
                last[redirects.get(used, used)] = self._index[node]
        places = sorted(self._index[node] for node in self._order if node.name in cuts)
        return {node for node in needed if any(self._index[node] < place <= last.get(node, -1) for place in places)}

    def _compute(
        self, needed: Sequence[fx.Node], redirects: Mapping[fx.Node, fx.Node], base: _Base | None, kept: set[fx.Node],
        into: dict[fx.Node, list[Any]],
    ) -> list[list[Tensor]]:  # fmt: skip
        uses = Counter(redirects.get(used, used) for node in needed for used in node.all_input_nodes)
        outputs = [redirects.get(node, node) for node in self._outputs]
        uses.update(outputs)
        self.computed += len(needed) * len(self._inputs)
        results = []
        for batch in range(len(self._inputs)):
            given = {} if base is None else {node: values[batch] for node, values in base.values.items()}
            values = self._batch(needed, redirects, batch, given, Counter(uses), kept, into)
            results.append([values[node] if node in values else self._given(node, batch, given) for node in outputs])
        return results

    def _batch(
        self, needed: Sequence[fx.Node], redirects: Mapping[fx.Node, fx.Node], batch: int, given: Mapping[fx.Node, Any],
        left: Counter[fx.Node], kept: set[fx.Node], into: dict[fx.Node, list[Any]],
    ) -> dict[fx.Node, Any]:  # fmt: skip
        values: dict[fx.Node, Any] = {}

        def load(used: fx.Node) -> Any:
            read = redirects.get(used, used)
            return values[read] if read in values else self._given(read, batch, given)

        for node in needed:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
            values[node] = call(node, args, kwargs, {})
            if node in kept:
                self._keep_value(node, values[node], into)
            for used in node.all_input_nodes:
                read = redirects.get(used, used)
                left[read] -= 1
                if not left[read]:
                    values.pop(read, None)
        return values

    def _keep_value(self, node: fx.Node, value: Any, into: dict[fx.Node, list[Any]]) -> None:
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)) * len(self._inputs)
        if node in into:
            into[node].append(value)
        elif size <= self._room.values:
            self._room.values -= size
            into[node] = [value]

    def _given(self, node: fx.Node, batch: int, given: Mapping[fx.Node, Any]) -> Any:
        """A kept value, an input, or what is made of constants."""
        if node in given:
            return given[node]
        if node.op == "placeholder":
            return self._inputs.tensor(node.name, batch)
        if node in self._weights:
            return self._weights[node]
        if node.op == "get_attr":
            value: Any = self._program.constants[str(node.target)].materialize()
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self._made(used, given))
            value = call(node, args, kwargs, {})
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        if size <= self._room.weights:
            self._room.weights -= size
            self._weights[node] = value
        return value

    def _made(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """What a static call reads: read once for it, and not kept."""
        if node.op == "get_attr":
            return self._program.constants[str(node.target)].materialize()
        return self._given(node, 0, given)
