"""Runs a graph over many batches, on demand: up to the values that are asked for next, and with no more of them kept than that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qcompile.errors import PassError, QCompileError
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph, operator_name
from qcompile.ir.verify import where
from qcompile.passes.convert_dtype import convert
from qcompile.passes.substitutes import NARROW, SUBSTITUTES, narrowed
from qcompile.passes.values import ValueStore

Progress = Callable[[int, int], None]
"""Called with (done, total) as work goes on."""


class Inputs(Protocol):
    """What feeds a graph: a number of batches, and the tensor of each placeholder in each of them."""

    def __len__(self) -> int:
        """How many batches there are."""

    def tensor(self, placeholder: str, batch: int) -> Tensor:
        """The placeholder's tensor; made anew on each call."""

    def real(self, batch: int) -> Tensor | None:
        """Which tokens [B, S] of the batch are no padding; None where all are real."""


class Observer(Protocol):
    """Sees a value as it is computed."""

    cost: int
    """Bytes that it holds while it observes."""

    def add(self, value: Any, real: Tensor | None) -> None:
        """Take in the value of one batch; `real` [B, S] says which of its tokens are no padding."""

    def finish(self) -> None:
        """All batches have been seen."""


@dataclass(frozen=True)
class Limits:
    """How much is held at a time.

    Attributes:
        values: bytes of values in memory; more goes to files.
        constants: bytes of constants in memory, beside the one that is needed next.
        directory: where files of values go; None for the system's temporary folder.
    """

    values: int = 8 << 30
    constants: int = 256 << 20
    directory: Path | None = None


_SHARED = 1 << 20
"""Constants up to this size (gains, small rotation matrices, tables) are kept for the whole run: many nodes read them."""


class Execution:
    """One run of a graph over all batches, in float32 whatever the graph's own dtype; a context manager.

    It is told at the start which values will be wanted, stop by stop. `advance` computes what the next stop wants, batch by batch
    through everything that lies between; values are freed after their last use, and what no stop needs is never computed.
    """

    def __init__(
        self, graph: Graph, inputs: Inputs, stops: Sequence[Iterable[str]], *, observers: Mapping[str, Observer] | None = None,
        limits: Limits | None = None, progress: Progress | None = None, narrow: bool = False,
    ) -> None:  # fmt: skip
        """Prepare to stop at the values named in each of `stops`; `observers` see values without stopping for them.

        With `narrow`, large linears multiply in bfloat16 where the CPU does that faster.

        Raises:
            PassError: if a value is not in the graph.
        """
        self.inputs = inputs
        self._program = graph.clone()
        convert(self._program, torch.float32, values=False)
        self._nodes = {node.name: node for node in self._program.nodes}
        self._order = {node: index for index, node in enumerate(self._program.nodes)}
        self._stops = [[self._find(name) for name in stop] for stop in stops]
        self._observers = {self._find(name): observer for name, observer in (observers or {}).items()}
        self._limits = limits or Limits()
        self._substitutes = NARROW if narrow else SUBSTITUTES
        self._store = ValueStore(self._limits.values, self._limits.directory)
        self._shared: dict[str, Tensor] = {}
        self._replaced: dict[str, Tensor | Constant] = {}
        self._static = static_nodes(self._program)
        self._computed: set[fx.Node] = set()
        needed = self._behind([*self._observers, *(node for stop in self._stops for node in stop)])
        self._uses = Counter(used for node in needed for used in node.all_input_nodes if self._is_stored(used))
        self._uses.update(node for stop in self._stops for node in stop if self._is_stored(node))
        self._progress, self._done, self._total = progress, 0, len(needed) * len(inputs)

    def __enter__(self) -> Execution:
        self._store.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._store.__exit__(*error)

    def advance(self, stop: int) -> None:
        """Compute, for all batches, what stop number `stop` wants."""
        self._compute(self._behind(self._stops[stop]))

    def observe(self) -> None:
        """Compute everything that an observer is to see."""
        for node in self._observers:
            if not self._is_stored(node):
                self._observe_given(node)
        self._compute(self._behind(self._observers))

    def value(self, name: str, batch: int) -> Any:
        """A value that `advance` has computed and no `release` has freed; constants and placeholders can always be had."""
        node = self._find(name)
        return self._store.get(node.name, batch) if self._is_stored(node) else self._given(node, batch, {})

    def release(self, stop: int) -> None:
        """Say that the values of this stop have been read."""
        for node in self._stops[stop]:
            if self._is_stored(node):
                self._uses[node] -= 1
                if not self._uses[node] and node in self._computed:
                    self._store.drop(node.name)

    def replace(self, name: str, value: Tensor | Constant) -> None:
        """From now on the constant called `name` has this value."""
        self._replaced[name] = value
        self._shared.pop(name, None)

    def _find(self, name: str) -> fx.Node:
        if name not in self._nodes:
            raise PassError(f"stream: expected a value of the graph, got {name!r}; name a node as the listing shows it")
        return self._nodes[name]

    def _is_stored(self, node: fx.Node) -> bool:
        return node not in self._static and node.op == "call_function"

    def _behind(self, wanted: Iterable[fx.Node]) -> list[fx.Node]:
        """What must be computed for `wanted` and is not yet, in order."""
        found: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node not in found and node not in self._computed and self._is_stored(node):
                found.add(node)
                pending += node.all_input_nodes
        return sorted(found, key=self._order.__getitem__)

    def _compute(self, nodes: list[fx.Node]) -> None:
        for segment in self._segments(nodes):
            self._run(segment)
            self._computed.update(segment)
            for node in segment:
                if node in self._observers:
                    self._observers[node].finish()

    def _segments(self, nodes: list[fx.Node]) -> Iterable[list[fx.Node]]:
        """Runs of nodes whose constants and observers are held at once."""
        segment: list[fx.Node] = []
        held, names = 0, set[str]()
        for node in nodes:
            new = self._constants_of(node) - names
            cost = sum(self._program.constants[name].nbytes for name in new)
            cost += self._observers[node].cost if node in self._observers else 0
            if segment and cost and held + cost > self._limits.constants:
                yield segment
                segment, held, names = [], 0, set()
            segment.append(node)
            held, names = held + cost, names | new
        if segment:
            yield segment

    def _constants_of(self, node: fx.Node) -> set[str]:
        names, pending = set(), [used for used in node.all_input_nodes if used in self._static]
        while pending:
            used = pending.pop()
            pending += used.all_input_nodes
            if used.op == "get_attr":
                names.add(str(used.target))
        return names

    def _run(self, segment: list[fx.Node]) -> None:
        """All batches through one segment; a value is kept only if something after the segment reads it."""
        inside = Counter(used for node in segment for used in node.all_input_nodes if self._is_stored(used))
        after = self._uses - inside
        static: dict[fx.Node, Any] = {}
        for batch in range(len(self.inputs)):
            real = self.inputs.real(batch)
            values: dict[fx.Node, Any] = {}
            left = Counter(inside)
            for node in segment:
                value = self._call(node, values, after, static, batch)
                if node in self._observers:
                    self._observers[node].add(value, real)
                if after[node]:
                    self._store.put(node.name, batch, value)
                if left[node]:
                    values[node] = value
                self._free(node, values, left)
            self._done += len(segment)
            if self._progress is not None:
                self._progress(self._done, self._total)
        self._uses = after

    def _free(self, node: fx.Node, values: dict[fx.Node, Any], left: Counter[fx.Node]) -> None:
        for used in node.all_input_nodes:
            left[used] -= 1
            if left[used] == 0:
                values.pop(used, None)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], after: Counter[fx.Node], static: dict[fx.Node, Any], batch: int) -> Any:
        def load(used: fx.Node) -> Any:
            if not self._is_stored(used):
                return self._given(used, batch, static)
            if used not in values:
                values[used] = self._store.get(used.name, batch) if after[used] else self._store.pop(used.name, batch)
            return values[used]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
        return call(node, args, kwargs, self._substitutes)

    def _given(self, node: fx.Node, batch: int, static: dict[fx.Node, Any]) -> Any:
        """A placeholder, a constant, or what is computed from constants alone."""
        if node.op == "placeholder":
            return self.inputs.tensor(node.name, batch)
        if node not in static:
            if node.op == "get_attr":
                constant = self._constant(str(node.target))
                static[node] = narrowed(constant) if self._substitutes is NARROW and _is_weight(node) else constant
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self._given(used, batch, static))
                static[node] = call(node, args, kwargs)
        return static[node]

    def _constant(self, name: str) -> Tensor:
        if name in self._shared:
            return self._shared[name]
        value = self._replaced.get(name, self._program.constants[name])
        tensor = value.materialize() if isinstance(value, Constant) else value
        wanted = self._program.constants[name].dtype
        tensor = tensor.to(wanted) if tensor.dtype != wanted else tensor
        if tensor.nbytes <= _SHARED:
            self._shared[name] = tensor
        return tensor

    def _observe_given(self, node: fx.Node) -> None:
        for batch in range(len(self.inputs) if node.op == "placeholder" else 1):
            self._observers[node].add(self._given(node, batch, {}), self.inputs.real(batch) if node.op == "placeholder" else None)
        self._observers[node].finish()


def _is_weight(node: fx.Node) -> bool:
    """Whether a constant is the weight of linears and nothing else."""
    return all(user.target is torch.ops.aten.linear.default and user.args[1] is node and user.args[0] is not node for user in node.users)


def static_nodes(graph: Graph) -> set[fx.Node]:
    """Constants, and calls that depend on nothing else."""
    static: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(used in static for used in node.all_input_nodes)):
            static.add(node)
    return static


def call(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], substitutes: Mapping[Any, Any] = SUBSTITUTES, *, gradient: bool = False
) -> Any:
    """The node's value from its arguments, without gradient unless asked for; `substitutes` run in place of operators.

    Raises:
        QCompileError: naming the node whose operator failed.
    """
    target: Any = substitutes.get(node.target, node.target)
    try:
        with torch.set_grad_enabled(gradient):
            return target(*args, **kwargs)
    except QCompileError:
        raise
    except Exception as error:
        raise QCompileError(f"{where(node)}: {operator_name(node.target)} failed on calibration data: {error}") from error
