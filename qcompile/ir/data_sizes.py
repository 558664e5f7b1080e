"""Sizes that only values decide (boxes that stay, places that are not 0), as symbols of the graph like those of its inputs.

Tracing gives such a size a symbol that nothing may ask about. Here it becomes one that behaves as a size of an input does, so that passes
and the printer need not know of it; an engine learns its value when the operator that makes it has run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from qcompile.ir.graph import Graph

_EXAMPLE = 12
"""What a new symbol is taken to be where a number is asked for and none is known: neither 0 nor 1, which mean more."""


def settle_sizes(graph: Graph) -> None:
    """Replace symbols that tracing made for sizes of results, in place, and name each after the first node that has it."""
    found: dict[Any, tuple[fx.Node, int, int]] = {}
    for node in graph.nodes:
        for place, leaf in enumerate(pytree.tree_leaves(node.meta.get("val"))):
            for axis, size in enumerate(_sizes(leaf)):
                for symbol in _undecided(size):
                    found.setdefault(symbol, (node, place, axis))
    if not found:
        return
    sizes = new_sizes(graph.mode, _examples(graph, found))
    table = dict(zip(found, sizes, strict=True))
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _replaced(graph.mode, node.meta["val"], table)
    names = [f"{node.name}_{axis}" for node, _, axis in found.values()]
    graph.interface.symbols |= {str(size): name for size, name in zip(sizes, names, strict=True)}


def _examples(graph: Graph, found: Mapping[Any, tuple[fx.Node, int, int]]) -> list[int]:
    """What each symbol is on the graph's own examples, so that relations between sizes hold; 0 and 1 mean too much to be examples."""
    if any(node.name not in graph.interface.examples for node in graph.placeholders):
        return [_EXAMPLE] * len(found)
    program = graph.clone()
    nodes = {node.name: node for node in program.nodes}
    program.output.args = (tuple(nodes[node.name] for node, _, _ in found.values()),)
    program.remove_dead()
    values = program.run([graph.interface.examples[node.name] for node in graph.placeholders])
    leaves = [_sizes(pytree.tree_leaves(value)[place])[axis] for value, (_, place, axis) in zip(values, found.values(), strict=True)]
    return [size if size > 1 else _EXAMPLE for size in leaves]


def with_known_sizes(mode: FakeTensorMode, value: Any, known: Any) -> Any:
    """A fake result whose undecided sizes are those of the result that was `known` before it; new symbols where none was."""
    undecided = list(dict.fromkeys(_all_undecided(value)))
    if not undecided:
        return value
    before = pytree.tree_leaves(known)
    table: dict[Any, Any] = {}
    for place, leaf in enumerate(pytree.tree_leaves(value)):
        for axis, size in enumerate(_sizes(leaf)):
            if isinstance(size, torch.SymInt) and size.node.expr in undecided and place < len(before):
                table.setdefault(size.node.expr, _sizes(before[place])[axis])
    missing = [symbol for symbol in undecided if symbol not in table]
    table |= dict(zip(missing, new_sizes(mode, [_EXAMPLE] * len(missing)), strict=True))
    return _replaced(mode, value, table)


def new_sizes(mode: FakeTensorMode, examples: Sequence[int]) -> list[torch.SymInt]:
    """Fresh symbolic sizes, one for each example, no two of them related; `mode` has an environment of shapes."""
    if not examples:
        return []
    # Heavy (sympy), and needed only by whoever asks for the graph itself: an engine runs the plan.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    environment: Any = mode.shape_env

    def new_size(example: int) -> Any:
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        source = ConstantSource(f"size_{len(environment.backed_var_to_val)}")
        return mode.from_tensor(torch.empty(example, device="meta"), symbolic_context=context, source=source).shape[0]

    return [new_size(example) for example in examples]


def _sizes(leaf: Any) -> list[Any]:
    if isinstance(leaf, Tensor):
        return list(leaf.shape)
    return [leaf] if isinstance(leaf, torch.SymInt) else []


def _undecided(size: Any) -> list[Any]:
    """The symbols in a size that stand for no example, in order."""
    if not isinstance(size, torch.SymInt):
        return []
    environment = size.node.shape_env
    return sorted((item for item in size.node.expr.free_symbols if environment.is_unbacked_symint(item)), key=str)


def _all_undecided(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        for size in _sizes(leaf):
            yield from _undecided(size)


def _replaced(mode: FakeTensorMode, value: Any, table: dict[Any, Any]) -> Any:
    """The value with symbols replaced by sizes."""
    expressions = {symbol: size.node.expr if isinstance(size, torch.SymInt) else size for symbol, size in table.items()}

    def size_of(size: Any) -> Any:
        if not _undecided(size):
            return size
        environment: Any = mode.shape_env
        expression = size.node.expr.xreplace(expressions)
        return environment.create_symintnode(expression, hint=int(expression.xreplace(dict(environment.backed_var_to_val))))

    def leaf_of(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return size_of(leaf)
        if not isinstance(leaf, Tensor) or not any(map(_undecided, (*leaf.shape, *leaf.stride()))):
            return leaf
        with mode:
            return torch.empty_strided([size_of(size) for size in leaf.shape], [size_of(size) for size in leaf.stride()], dtype=leaf.dtype)

    return pytree.tree_map(leaf_of, value)
