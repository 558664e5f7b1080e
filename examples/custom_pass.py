"""A new pass from nothing: linears that read the same input become one linear over their stacked weights.

Groups of a quantized weight lie along its rows, so stacking rows changes no code and no scale: int4 gives the same numbers in fewer calls.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

import qcompile
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.pipelines import default_pipeline, insert
from qcompile.passes.selection import matching_pattern
from qcompile.target import parse_target

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Stacked:
    """Constants one below the other: a `Source`, so nothing is read before somebody asks for it."""

    parts: tuple[Constant, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows add up."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The parts' own."""
        return self.parts[0].dtype

    @property
    def key(self) -> str:
        """The parts' keys: fingerprints are made of it."""
        return f"stacked({', '.join(part.key for part in self.parts)})"

    def load(self) -> Tensor:
        """Read and join."""
        return torch.cat([part.materialize() for part in self.parts])


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """`linear(x, A)` and `linear(x, B)` become `split(linear(x, stacked(A, B)))`."""

    name: ClassVar[str] = "merge-siblings"
    least: int = 2

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Groups by input and by having a bias; a weight with other readers, or one the scheme ignores, stays as it is."""
        groups: dict[tuple[Any, bool], list[fx.Node]] = defaultdict(list)
        for node in graph.calls(aten.linear.default):
            if _is_movable(graph, node, ctx):
                groups[node.args[0], node.args[2] is None].append(node)
        chosen = [group for group in groups.values() if len(group) >= self.least and ctx.spend()]
        for group in chosen:
            _merge(graph, group)
        graph.remove_dead()
        return bool(chosen)


def _is_movable(graph: Graph, node: fx.Node, ctx: PassContext) -> bool:
    """A merged linear stands at the first sibling, so all that it reads beside `x` must be constant."""
    operands = [used for used in node.args[1:] if isinstance(used, fx.Node)]
    constant = all(graph.constant(used) is not None and len(used.users) == 1 for used in operands)
    return constant and matching_pattern(str(operands[0].target), ctx.target.scheme.ignore) is None


def _merge(graph: Graph, group: list[fx.Node]) -> None:
    first, stacked = group[0], []
    for place in (1, 2):
        operands = [used for node in group if isinstance(used := node.args[place], fx.Node)]
        name = "+".join(str(used.target) for used in operands)
        parts = tuple(graph.constants[str(used.target)] for used in operands)
        stacked.append(graph.add_constant(name, Constant(Stacked(parts)), source=first) if parts else None)
    joined = graph.insert(first, aten.linear.default, (first.args[0], *stacked))
    start = 0
    for node in group:
        size = node.meta["val"].shape[-1]
        graph.replace(node, graph.insert(first if node is first else node, aten.narrow.default, (joined, -1, start, size), source=node))
        start += size


class Block(nn.Module):
    """Attention of one head and a gated MLP: two groups of siblings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, S, width] to the same shape."""
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        result: Tensor = x + self.down(nn.functional.silu(self.gate(mixed)) * self.up(mixed))
        return result


def main() -> None:
    """Compile a block with and without the pass, checked, and compare."""
    torch.manual_seed(0)
    model, x = Block(64).eval(), torch.randn(2, 8, 64)
    plain = default_pipeline(parse_target("cpu-int4"))
    longer = insert(plain, MergeSiblings(), before="convert-dtype")
    with tempfile.TemporaryDirectory() as scratch:
        merged = qcompile.compile(model, "cpu-int4", example_inputs=x, passes=longer, check=True, dump=scratch)
        print(next(Path(scratch).glob("*_merge-siblings.diff")).read_text())
    print(merged.report())
    difference = (merged(x) - qcompile.compile(model, "cpu-int4", example_inputs=x, passes=plain)(x)).abs().max()
    print(f"largest difference from the model compiled without the pass: {difference:.1e}")


if __name__ == "__main__":
    main()
