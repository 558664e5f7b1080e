"""Runs a graph on its example inputs, whatever the size of its constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph, evaluate
from qcompile.passes.convert_dtype import convert
from qcompile.passes.execution import static_nodes

CONSTANT_BYTES = 2 << 30
"""Of constants that are kept from one operator, and from one run, to the next."""
_SMALL = 1 << 20
"""What is computed from constants alone and takes no more than this is computed once in a run: many operators read it."""

See = Callable[[fx.Node, Any], None]
"""Called with each call that depends on an input, and its value."""


class ExampleRun:
    """Runs graphs on their example inputs and keeps what constants they read, up to `limit` bytes.

    A constant that finds no room is read for each operator that needs it and dropped again. So at most `limit` bytes of constants are
    in memory, and beside them those of one operator; a model that fits is read once for all runs.
    """

    def __init__(self, limit: int = CONSTANT_BYTES) -> None:
        """Keep at most `limit` bytes of constants."""
        self.limit = limit
        self.most = 0
        self._kept: dict[str, Tensor] = {}

    @property
    def held(self) -> int:
        """Bytes of constants that are kept now."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def run(self, graph: Graph, *, wide: bool, see: See | None = None) -> list[Tensor]:
        """The outputs; logits of padding tokens are zero.

        Args:
            graph: with example inputs.
            wide: compute in float64.
            see: called with every value on its way.

        Raises:
            QCompileError: naming the node whose operator failed.
        """
        program = self._program(graph, wide=wide)
        used = {constant.key for constant in program.constants.values()}
        self._kept = {key: tensor for key, tensor in self._kept.items() if key in used}
        values = _Values(program, self)
        with torch.no_grad():
            result = values.outputs(see)
        real = real_tokens(program.interface.examples)
        if real is not None:
            result[0] = result[0] * real.unsqueeze(-1)  # they mean nothing, with a cache or without
        return result

    def static(self, graph: Graph, node: fx.Node) -> Any:
        """The value of a node of `graph` that depends on constants alone."""
        with torch.no_grad():
            return _Values(graph, self).of(node)

    @staticmethod
    def _program(graph: Graph, *, wide: bool) -> Graph:
        if not wide:
            return graph
        program = graph.clone()
        convert(program, torch.float64, values=False)
        return program

    def constants(self, graph: Graph, names: set[str]) -> dict[str, Tensor]:
        """The constants that one operator reads. All of them are kept if they fit, or none: the parts of a rounding stay together."""
        wanted = {name: graph.constants[name] for name in names}
        new = {constant.key: constant.nbytes for constant in wanted.values() if constant.key not in self._kept}
        found = {name: self._kept[item.key] if item.key in self._kept else item.materialize() for name, item in wanted.items()}
        held = self.held
        if held + sum(new.values()) <= self.limit:
            self._kept |= {wanted[name].key: tensor for name, tensor in found.items()}
        self.most = max(self.most, held + sum(new.values()))
        return found


class _Values:
    """One run: values are freed after their last use, and what depends on constants alone is computed for whoever reads it."""

    def __init__(self, program: Graph, owner: ExampleRun) -> None:
        self._program, self._owner = program, owner
        self._static = static_nodes(program)
        self._values: dict[fx.Node, Any] = {}

    def outputs(self, see: See | None) -> list[Tensor]:
        """Run everything that depends on an input."""
        examples = self._program.interface.examples
        self._values |= {node: examples[node.name] for node in self._program.placeholders}
        left = {node: len(node.users) for node in self._program.fx.nodes}
        for node in self._program.fx.nodes:
            if node.op == "call_function" and node not in self._static:
                self._values[node] = evaluate(node, self._operands(node))
                if see is not None:
                    see(node, self._values[node])
                for used in node.all_input_nodes:
                    left[used] -= 1
                    if not left[used]:
                        self._values.pop(used, None)
        return [self.of(node) for node in self._program.output.args[0]]  # type: ignore[union-attr, arg-type]

    def of(self, node: fx.Node) -> Any:
        """The value of a node that has been computed, or depends on constants alone."""
        return self._values[node] if node in self._values else self._given([node])[node]

    def _operands(self, node: fx.Node) -> dict[fx.Node, Any]:
        missing = [used for used in node.all_input_nodes if used not in self._values]
        return {used: self._values[used] for used in node.all_input_nodes if used in self._values} | self._given(missing)

    def _given(self, wanted: list[fx.Node]) -> dict[fx.Node, Any]:
        """Values of nodes that depend on constants alone."""
        behind = self._behind(wanted)
        names = {str(node.target) for node in behind if node.op == "get_attr"}
        tensors = self._owner.constants(self._program, names) if names else {}
        found: dict[fx.Node, Any] = {}
        for node in behind:
            if node in self._values:
                found[node] = self._values[node]
            elif node.op == "get_attr":
                found[node] = tensors[str(node.target)]
            else:
                found[node] = evaluate(node, found)
                if isinstance(found[node], Tensor) and found[node].nbytes <= _SMALL:
                    self._values[node] = found[node]
        return found

    def _behind(self, wanted: list[fx.Node]) -> list[fx.Node]:
        """`wanted` and what they are computed from, in order; what is at hand needs nothing behind it."""
        found, pending = set[fx.Node](), list(wanted)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += [] if node in self._values else node.all_input_nodes
        return sorted(found)


def real_tokens(examples: dict[str, Tensor]) -> Tensor | None:
    """Which example tokens [B, S] of a language model are no padding; None for other models."""
    if "positions" in examples and "page_table" in examples:
        return examples["positions"] >= 0
    return examples["attention_mask"] != 0 if "position_ids" in examples else None
