"""`graphs.jsonl`: every graph of a compilation, node by node; a node that a pass left alone costs a number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from qcompile.ir.graph import Graph, operator_name
from qcompile.ir.layers import fold, layer_of
from qcompile.ir.provenance import origins
from qcompile.ir.text import Line

_KINDS = {"placeholder": "input", "get_attr": "constant", "call_function": "call", "output": "output"}


class GraphLog:
    """Appends one JSON line per listing to a file: the node records that are new, and the order of all by their numbers."""

    def __init__(self, path: Path) -> None:
        """Begin an empty file."""
        self._path = path
        self._numbers: dict[str, int] = {}
        path.write_text("", encoding="utf-8")

    def add(self, listing: str, index: int | None, graph: Graph, lines: Sequence[Line]) -> None:
        """Append a graph, whose listing has these lines; `index` is of the pass that made it, None for the input."""
        order, new = [], []
        for record in node_records(graph, lines):
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
            number = self._numbers.get(text)
            if number is None:
                number = self._numbers[text] = len(self._numbers)
                new.append(f'{{"id": {number}, {text[1:]}')
            order.append(number)
        head = json.dumps({"listing": listing, "pass": index})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f'{head[:-1]}, "new": [{", ".join(new)}], "order": {json.dumps(order)}}}\n')


def base_name(name: str) -> str:
    """The name of a weight without that of a packed part: `q_proj.weight` of `q_proj.weight.codes`."""
    base, _, part = name.rpartition(".")
    return base if part in ("codes", "scale", "scale2", "zero") else name


def node_records(graph: Graph, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Each node as JSON values, in order; `docs/dumps.md` says what each key holds."""
    homes: dict[fx.Node, str] = {}
    for node, line in zip(graph.fx.nodes, lines, strict=True):
        homes[node] = _home(node, homes)
        yield _record(graph, node, line, homes[node])


def _record(graph: Graph, node: fx.Node, line: Line, home: str) -> dict[str, Any]:
    constant = graph.constant(node)
    operator = operator_name(node.target) if node.op == "call_function" else ""
    folded = fold(home) if home else str(node.meta.get("source", "")).partition(":")[0]
    return {
        "name": node.name,
        "op": _KINDS[node.op],
        "operator": operator,
        "constant": None if constant is None else str(node.target),
        "call": line.call,
        "type": line.type,
        "format": line.format,
        "inputs": [used.name for used in node.all_input_nodes],
        "source": node.meta.get("source", ""),
        "origins": list(origins(node)),
        "passes": list(node.meta.get("passes", ())),
        "log": [] if constant is None else list(constant.log),
        "bytes": None if constant is None else constant.nbytes,
        "layer": layer_of(home),
        "folded": f"{folded}: {operator}" if operator else folded or node.name,
    }


def _home(node: fx.Node, homes: Mapping[fx.Node, str]) -> str:
    """The module or constant that a node belongs to, as a dotted name; the constant that it reads where nothing else is known."""
    if node.op == "get_attr":
        return str(node.target)
    for origin in origins(node):
        module, colon, _ = str(origin).partition(":")
        if colon:
            return module
    used = node.all_input_nodes
    return base_name(next((homes[value] for value in used if homes[value] and _is_constant(value)), ""))


def _is_constant(node: fx.Node) -> bool:
    """Whether a node is a constant, or a call that unpacks some."""
    if node.op == "get_attr":
        return True
    used = node.all_input_nodes if node.op == "call_function" else []
    return bool(used) and all(value.op == "get_attr" for value in used)
