"""The graph: ATen and `qcompile::` operators over `torch.fx` nodes, with constants held as handles beside it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from qcompile.errors import QCompileError, VerifyError
from qcompile.ir import allowed as _allowed  # noqa: F401  registers every qcompile:: operator
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.data_sizes import with_known_sizes
from qcompile.ir.provenance import Heirs, origins
from qcompile.ir.structure import Template, flatten, unflatten

Operator = Callable[..., Any]


CACHE_STATES = ("keys_", "values_", "sources_", "marks_", "recent_keys_", "recent_values_", "recent_sources_", "recent_saliency_")
"""What the names of the placeholders begin with that are a cache: pages of keys and values, of what they are made from and of how they
are packed, then rows of tokens that are kept as they came and of the attention they receive."""


@dataclass
class Interface:
    """What a caller passes and gets: templates over the graph's placeholders and outputs, and one small set of example inputs.

    Attributes:
        inputs: template of `(args, kwargs)`; leaf i is placeholder i.
        outputs: template of the result; leaf i is output i.
        examples: placeholder name -> a small real tensor, for checks and dumps.
        symbols: symbol in a shape (`s27`) -> what it counts (`batch`, `sequence`).
        kind: "causal_lm" where `input_ids`, `attention_mask`, `position_ids` go in and next-token logits come out, else "module".
    """

    inputs: Template
    outputs: Template
    examples: dict[str, Tensor] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    kind: str = "module"


class Graph:
    """A program: `fx` nodes over named constants. It runs on a CPU after every pass.

    Every node carries `meta["val"]` (a fake tensor: shape and dtype), `meta["source"]` (`file.py:line`), `meta["origins"]` (the traced
    operators it descends from) and `meta["passes"]` (the passes that made or changed it).
    """

    def __init__(self, nodes: fx.Graph, constants: dict[str, Constant], interface: Interface, mode: FakeTensorMode) -> None:
        """Wrap `nodes`, whose get_attr targets are keys of `constants`, with the fake mode that their values live in."""
        self.fx = nodes
        self.constants = constants
        self.interface = interface
        self.mode = mode
        self.current_pass = ""
        self._heirs = Heirs()

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in execution order (a copy: safe to change the graph while iterating)."""
        return list(self.fx.nodes)

    @property
    def states(self) -> list[fx.Node]:
        """The placeholders that are a cache: what the program reads of them, it has written itself."""
        cached = self.interface.kind == "cached_lm"
        return [node for node in self.placeholders if cached and node.name.startswith(CACHE_STATES)]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs in order."""
        return list(self.fx.find_nodes(op="placeholder"))

    @property
    def output(self) -> fx.Node:
        """The output node; its single argument is the tuple of outputs."""
        found: fx.Node = next(iter(self.fx.find_nodes(op="output")))
        return found

    def calls(self, *operators: Operator) -> list[fx.Node]:
        """The call nodes of any of `operators`, in order."""
        wanted = set(operators)
        return [node for node in self.fx.nodes if node.op == "call_function" and node.target in wanted]

    def constant(self, node: object) -> Constant | None:
        """The constant that `node` reads, or None if it is not a constant."""
        return self.constants[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def bind(self, name: str, constant: Constant) -> None:
        """Put another constant behind `name`, for all its users, and update the fake values."""
        self.constants[name] = constant
        for node in self.fx.find_nodes(op="get_attr", target=name):
            node.meta["val"] = self.fake(constant)

    def fake(self, constant: Constant) -> Tensor:
        """A fake tensor with the constant's shape and dtype."""
        with self.mode:
            return torch.empty(constant.shape, dtype=constant.dtype)

    def add_constant(self, name: str, value: Constant | Tensor, *, source: fx.Node | None = None) -> fx.Node:
        """Add a constant under `name` (made unique by a suffix) and return its node, placed before the inputs."""
        constant = tensor_constant(value) if isinstance(value, Tensor) else value
        unique, suffix = name, 0
        while unique in self.constants:
            suffix += 1
            unique = f"{name}_{suffix}"
        self.constants[unique] = constant
        first = next(iter(self.fx.find_nodes(op="placeholder", sort=True)), None) or next(iter(self.fx.nodes))
        with self.fx.inserting_before(first):
            node = self.fx.get_attr(unique)
        node.meta["val"] = self.fake(constant)
        self._mark(node, source)
        return node

    def insert(
        self, before: fx.Node, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
        source: fx.Node | None = None, value: Any = None,
    ) -> fx.Node:  # fmt: skip
        """Insert a call of `operator` before a node; its fake value is computed unless `value` gives it.

        `source` is the node it descends from, whose source line and history it takes over (default: `before`).
        """
        with self.fx.inserting_before(before):
            node = self.fx.create_node("call_function", operator, tuple(args), kwargs or {}, name=_node_name(operator))
        node.meta["val"] = self.infer(node) if value is None else value
        self._mark(node, source if source is not None else before)
        if not origins(node):  # made of an input or a constant, for what reads it
            node.meta["origins"] = origins(before)
        return node

    def infer(self, node: fx.Node) -> Any:
        """The fake value of a call node from the fake values of its arguments; a size that values decide keeps its symbol."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
        with self.mode:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return with_known_sizes(self.mode, value, node.meta.get("val"))

    def replace(self, node: fx.Node, replacement: fx.Node) -> None:
        """Let all users of `node` use `replacement`, which takes over its origins, and erase `node`."""
        self._heirs.replaced(node, replacement)
        node.replace_all_uses_with(replacement)
        self.fx.erase_node(node)

    def remove_dead(self) -> int:
        """Erase call and get_attr nodes without users, and constants without nodes; returns how many nodes went."""
        removed = 0
        for node in reversed(self.nodes):
            if node.op in ("call_function", "get_attr") and not node.users and not is_effect(node):
                self._heirs.removed(node)
                self.fx.erase_node(node)
                removed += 1
        used = {str(node.target) for node in self.fx.find_nodes(op="get_attr")}
        self.constants = {name: constant for name, constant in self.constants.items() if name in used}
        return removed

    def _mark(self, node: fx.Node, source: fx.Node | None) -> None:
        node.meta["source"] = source.meta.get("source", "") if source is not None else ""
        node.meta["origins"] = origins(source) if source is not None else ()
        history = source.meta.get("passes", ()) if source is not None else ()
        node.meta["passes"] = history if not self.current_pass or self.current_pass in history else (*history, self.current_pass)

    def clone(self) -> Graph:
        """A copy with its own nodes; constants (handles) are shared."""
        nodes = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.fx.nodes:
            mapping[node] = nodes.node_copy(node, lambda old: mapping[old])
            mapping[node].name = node.name
        interface = Interface(
            self.interface.inputs, self.interface.outputs, dict(self.interface.examples), dict(self.interface.symbols), self.interface.kind
        )
        return Graph(nodes, dict(self.constants), interface, self.mode)

    def fingerprint(self) -> str:
        """Sixteen hex digits over structure and constant logs (not over bytes)."""
        digest = hashlib.sha256()
        for node in self.fx.nodes:
            key = self.constants[str(node.target)].key if node.op == "get_attr" else ""
            digest.update(f"{node.op} {node.target} {node.args} {node.kwargs} {key}\n".encode())
        return digest.hexdigest()[:16]

    def text(self) -> str:
        """The listing: one typed line per node, with source lines and history."""
        from qcompile.ir.text import listing

        return listing(self)

    def verify(self) -> None:
        """Check every rule of the representation.

        Raises:
            VerifyError: naming the node, what was expected and what came.
        """
        from qcompile.ir.verify import verify

        verify(self)

    def run(self, leaves: Sequence[Tensor], materialized: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Execute node by node through the operators' references; values are freed after their last use.

        Args:
            leaves: one tensor per placeholder.
            materialized: a memo of constants that is filled and read; without it each constant lives as long as its uses.
        """
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, leaves, strict=True))
        remaining = {node: len(node.users) for node in self.fx.nodes}
        with torch.no_grad():
            for node in self.fx.nodes:
                if node.op == "get_attr":
                    values[node] = self._materialize(str(node.target), materialized)
                elif node.op == "call_function":
                    values[node] = evaluate(node, values)
                    for used in node.all_input_nodes:
                        remaining[used] -= 1
                        if not remaining[used]:
                            del values[used]
        return [values[node] for node in self.output.args[0]]  # type: ignore[union-attr, index]

    def _materialize(self, name: str, memo: dict[str, Tensor] | None) -> Tensor:
        if memo is None:
            return self.constants[name].materialize()
        if name not in memo:
            memo[name] = self.constants[name].materialize()
        return memo[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on real tensors, passed and returned in the containers the model was traced with."""
        leaves = flatten(self.interface.inputs, (args, kwargs))
        self.require_inputs(leaves)
        return unflatten(self.interface.outputs, self.run(leaves))

    def require_inputs(self, leaves: Sequence[Tensor]) -> None:
        """Check one tensor per placeholder against its dtype and shape; a symbol must have one size wherever it stands.

        Raises:
            QCompileError: naming the input, what was expected and what came.
        """
        from qcompile.ir.text import type_text

        sizes: dict[str, int] = {}
        for node, leaf in zip(self.placeholders, leaves, strict=True):
            value: Tensor = node.meta["val"]
            fits = leaf.dtype == value.dtype and leaf.dim() == value.dim()
            for wanted, size in zip(value.shape, leaf.shape, strict=False):
                fits = fits and (size == wanted if isinstance(wanted, int) else sizes.setdefault(str(wanted), size) == size)
            if not fits:
                known = {symbol: str(sizes.get(symbol, name)) for symbol, name in self.interface.symbols.items()}
                raise QCompileError(
                    f"{node.name}: expected {type_text(value, known)}, got {type_text(leaf, {})}; compile again with example_inputs "
                    "of that kind"
                )


def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a call makes of its operands' values, by its operator's reference.

    Raises:
        QCompileError: naming the node whose operator failed.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except QCompileError:
        raise
    except Exception as error:
        raise QCompileError(f"{node.name} ({node.meta.get('source', '')}): {operator_name(node.target)} failed: {error}") from error


def operator_name(target: object) -> str:
    """`aten.linear` for aten.linear.default, `aten.add.Tensor`, `rms_norm` for qcompile.rms_norm.default, `operator.add`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default").removeprefix("qcompile.")
    return f"{getattr(target, '__module__', '').lstrip('_')}.{getattr(target, '__name__', target)}"


def _node_name(target: object) -> str:
    """`linear`, `rms_norm`, `getitem`: the operator without namespace and overload."""
    return operator_name(target).removeprefix("aten.").removeprefix("operator.").split(".")[0]


def is_effect(node: fx.Node) -> bool:
    """Whether the node is kept although nothing uses its result: it writes into an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def fake_value(node: object) -> Tensor:
    """The fake tensor of a node that must be a tensor.

    Raises:
        VerifyError: if it is not a node with a tensor value.
    """
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise VerifyError(f"{node}: expected a node with a tensor value, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Leave any fake mode that is active, so that real tensors can be computed."""
    with unset_fake_temporarily():
        yield
