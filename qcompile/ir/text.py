"""The one printer: a graph as deterministic text, one line per node."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from qcompile.ir.constants import log_text
from qcompile.ir.graph import operator_name
from qcompile.quant.scheme import dtype_name

if TYPE_CHECKING:
    from qcompile.ir.graph import Graph

_LETTERS = {"batch": "B", "sequence": "S", "capacity": "C", "pages": "P"}


class Line(NamedTuple):
    """One node of a listing, in the parts that it is printed from.

    Attributes:
        call: `%name = operator(arguments)`.
        type: `f32[B, S, 576]`, "" for the output.
        format: of a quantized constant, "" for others.
        note: source line, history, and the log of a constant.
    """

    call: str
    type: str
    format: str
    note: str


def lines(graph: Graph) -> list[Line]:
    """Every node in order."""
    names = {symbol: _LETTERS.get(name, name) for symbol, name in graph.interface.symbols.items()}
    return [_line(graph, node, names) for node in graph.fx.nodes]


def listing(graph: Graph) -> str:
    """Every node as `%name = operator(arguments)  type[shape] format  # source  history`, columns aligned."""
    return aligned(lines(graph))


def aligned(rows: Sequence[Line]) -> str:
    """The lines as text, columns aligned."""
    cells = [(row.call, f"{row.type} {row.format}" if row.format else row.type, row.note) for row in rows]
    call_width = min(96, max((len(row[0]) for row in cells), default=0))
    type_width = min(48, max((len(row[1]) for row in cells), default=0))
    return "\n".join(f"{call:<{call_width}}  {kind:<{type_width}}  {note}".rstrip() for call, kind, note in cells) + "\n"


def _line(graph: Graph, node: fx.Node, names: dict[str, str]) -> Line:
    history = " > ".join(node.meta.get("passes", ()))
    source = node.meta.get("source", "")
    note = "  ".join(part for part in (f"# {source}" if source else "", history) if part)
    if node.op == "output":
        return Line(f"return {_argument(node.args[0])}", "", "", note)
    kind = type_text(node.meta.get("val"), names)
    if node.op == "placeholder":
        return Line(f"%{node.name} = input", kind, "", note)
    if node.op == "get_attr":
        constant = graph.constants[str(node.target)]
        log = " | ".join(map(log_text, constant.transforms))
        note = "  ".join(part for part in (note, log and f"[{log}]") if part)
        return Line(f"%{node.name} = constant({node.target})", kind, str(constant.format or ""), note)
    arguments = _positional(node)
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return Line(f"%{node.name} = {operator_name(node.target)}({', '.join(arguments)})", kind, "", note)


def _positional(node: fx.Node) -> list[str]:
    """Tensors as they stand, numbers with the name that the operator's schema gives them; trailing Nones are left out."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    shown = list(node.args)
    while shown and shown[-1] is None:
        shown.pop()
    plain = (fx.Node, list, tuple)
    return [
        f"{names[index]}={_argument(value)}"
        if index < len(names) and value is not None and not isinstance(value, plain)
        else _argument(value)
        for index, value in enumerate(shown)
    ]


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        inner = ", ".join(_argument(item) for item in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, int) and value >= 1 << 62:
        return "end"
    return str(value)


def type_text(value: Any, names: dict[str, str]) -> str:
    """`f32[B, S, 576]` for a tensor, `int` for a symbolic size, a parenthesised list for several results."""
    if isinstance(value, Tensor):
        sizes = ", ".join(symbol_text(size, names) for size in value.shape)
        return f"{dtype_name(value.dtype)}[{sizes}]"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(type_text(item, names) for item in value) + ")"
    if isinstance(value, int | torch.SymInt):
        return f"int {symbol_text(value, names)}"
    return type(value).__name__ if value is not None else ""


def symbol_text(size: Any, names: dict[str, str]) -> str:
    """A size with its symbols called by what they count."""
    return re.sub(r"[a-zA-Z]+\d+", lambda found: names.get(found[0], found[0]), str(size))
