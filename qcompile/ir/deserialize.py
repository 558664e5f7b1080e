"""A graph from the JSON that `qcompile.ir.serialize` writes; shapes are rebuilt as fake tensors over fresh symbols."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.errors import ArtifactError
from qcompile.ir.allowed import ALLOWED
from qcompile.ir.constants import Constant
from qcompile.ir.data_sizes import new_sizes
from qcompile.ir.graph import Graph, Interface
from qcompile.ir.memory import dtype_of
from qcompile.ir.serialize import check_graph_json, memory_format_of

_SYMBOLIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "ceildiv": lambda a, b: (a + b - 1) // b,
    "mod": lambda a, b: a % b,
    "min": torch.sym_min,
    "max": torch.sym_max,
}


def graph_from_json(data: Any, constants: dict[str, Constant]) -> Graph:
    """The graph over `constants`, with a fake value on every node.

    Raises:
        ArtifactError: for an operator off the allow-list, a missing constant or node, or a malformed entry, naming the node.
    """
    check_graph_json(data)
    try:
        return _Reader(data, constants).graph()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ArtifactError(f"graph.json: expected what this version writes, got {type(error).__name__}: {error}; compile again") from error


class _Reader:
    """One pass over the nodes; symbols are made once for the names that sizes use."""

    def __init__(self, data: Mapping[str, Any], constants: dict[str, Constant]) -> None:
        self.data, self.constants = data, constants
        self.nodes: dict[str, fx.Node] = {}
        used = {name for node in data["nodes"] for name in _names(node.get("type"))}
        ordered = [name for name in data["interface"]["symbols"] if name in used]
        self.mode, self.symbols = _symbols([*ordered, *sorted(used.difference(ordered))])

    def graph(self) -> Graph:
        program = fx.Graph()
        for item in self.data["nodes"]:
            self.nodes[item["name"]] = self._node(program, item)
        return Graph(program, dict(self.constants), self._interface(self.data["interface"]), self.mode)

    def _node(self, program: fx.Graph, item: Mapping[str, Any]) -> fx.Node:
        name, op = item["name"], item["op"]
        args = tuple(self._argument(value, name) for value in item.get("args", ()))
        kwargs = {key: self._argument(value, name) for key, value in item.get("kwargs", {}).items()}
        if op == "placeholder":
            node = program.placeholder(name)
        elif op == "get_attr":
            node = program.get_attr(self._constant(item))
        elif op == "call_function":
            target = ALLOWED[item["target"]]
            node = program.call_function(target, args, _in_order(target, kwargs))
        else:
            node = program.output(args[0])
        node.name = name
        value = self._value(item["type"])
        if value is not None:
            node.meta["val"] = value
        node.meta |= {"source": str(item["source"]), "passes": tuple(map(str, item["passes"]))}
        node.meta["origins"] = tuple(map(str, item.get("origins", ())))
        return node

    def _constant(self, item: Mapping[str, Any]) -> str:
        target = item["target"]
        if target not in self.constants:
            raise ArtifactError(f"graph.json: {item['name']}: expected a constant of weights.safetensors, got {target!r}; compile again")
        return str(target)

    def _interface(self, data: Mapping[str, Any]) -> Interface:
        examples = {name: _example(item) for name, item in data["examples"].items()}
        symbols = {str(symbol): name for name, symbol in self.symbols.items()}
        return Interface(data["inputs"], data["outputs"], examples, symbols, str(data["kind"]))

    def _value(self, data: Any) -> Any:
        if data is None:
            return None
        if isinstance(data, list):
            return tuple(self._value(item) for item in data)
        if "size" in data:
            return self._size(data["size"])
        with self.mode:
            return torch.empty([self._size(size) for size in data["shape"]], dtype=dtype_of(data["dtype"], "graph.json"))

    def _size(self, data: Any) -> Any:
        if isinstance(data, str):
            return self.symbols[data]
        if isinstance(data, list):
            operator, left, right = data
            return _SYMBOLIC[operator](self._size(left), self._size(right))
        return int(data)

    def _argument(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [self._argument(item, where) for item in value]
        if not isinstance(value, dict):
            return value
        (kind, content), *more = value.items()
        readers: dict[str, Callable[[Any], Any]] = {
            "node": lambda name: self.nodes[name],
            "dtype": lambda name: dtype_of(name, f"graph.json: {where}"),
            "tuple": lambda items: tuple(self._argument(item, where) for item in items),
            "slice": lambda items: slice(*(self._argument(item, where) for item in items)),
            "size": self._size,
            "float": float,
            "memory_format": lambda name: memory_format_of(name, f"graph.json: {where}"),
            "layout": lambda _: torch.strided,
            "device": lambda _: torch.device("cpu"),
        }
        if more or kind not in readers:
            raise ArtifactError(f"graph.json: {where}: expected an argument of {', '.join(readers)}, got {kind!r}; compile again")
        return readers[kind](content)


def _in_order(target: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the order of the operator's declaration: stored objects are sorted by key."""
    schema = getattr(target, "_schema", None)
    declared = [argument.name for argument in schema.arguments] if schema is not None else []
    return {name: kwargs[name] for name in (*declared, *kwargs) if name in kwargs}


def _names(data: Any) -> set[str]:
    """The names that the sizes of a stored type use."""
    if isinstance(data, list):
        return set().union(*(_names(item) for item in data)) if data else set()
    if not isinstance(data, dict):
        return set()
    return _size_names(data["size"] if "size" in data else list(data.get("shape", ())))


def _size_names(data: Any) -> set[str]:
    if isinstance(data, str):
        return {data}
    if not isinstance(data, list):
        return set()
    expression = len(data) == 3 and isinstance(data[0], str) and data[0] in _SYMBOLIC
    return set().union(*(_size_names(item) for item in (data[1:] if expression else data))) if data else set()


def _symbols(names: list[str]) -> tuple[FakeTensorMode, dict[str, torch.SymInt]]:
    """A fake mode, and one fresh symbolic size per name, no two alike; sympy sorts them in the order of `names`."""
    if not names:
        return FakeTensorMode(), {}
    # Heavy (sympy), and needed only by whoever asks for the graph itself: an engine runs the plan.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode, dict(zip(names, sorted(new_sizes(mode, range(2, 2 + len(names))), key=str), strict=True))


def _example(data: Mapping[str, Any]) -> Tensor:
    dtype, shape = dtype_of(data["dtype"], "graph.json: examples"), [int(size) for size in data["shape"]]
    if "fill" in data:
        return torch.full(shape, data["fill"], dtype=dtype)
    content = bytearray(base64.b64decode(data["base64"], validate=True))
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
