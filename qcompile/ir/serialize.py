"""A graph as JSON and back: allow-listed operators, constants by name, sizes as expressions; nothing is evaluated, nothing unpickled.

An argument is a JSON value in which an object with one key stands for what JSON has not: {"node": name}, {"dtype": "fp32"},
{"tuple": [...]}, {"slice": [a, b, c]}, {"size": expression}, {"float": "-inf"}, {"memory_format": …}, {"layout": …}, {"device": "cpu"}.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import ArtifactError, FormatError
from qcompile.ir.allowed import ALLOWED, name_of
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph, Interface, operator_name
from qcompile.ir.provenance import origins
from qcompile.ir.size import Size
from qcompile.ir.symbols import size_expression
from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.scheme import dtype_name

_MEMORY_FORMATS = {str(item).removeprefix("torch."): item for item in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}


def format_of(text: str, where: str = "format") -> QuantFormat:
    """Read what `str(QuantFormat)` writes: `int4 g64 sym fp16`.

    Raises:
        ArtifactError: for text of another shape, or a format that does not exist.
    """
    try:
        return parse_format(text)
    except FormatError as error:
        raise ArtifactError(f"{where}: expected a format that exists, got {text!r}: {error}; compile again") from error


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """Everything of a graph but the bytes of its constants.

    Raises:
        ArtifactError: for an operator off the allow-list or an argument that cannot be stored, naming the node.
    """
    names = graph.interface.symbols
    return {
        "interface": _interface_to_json(graph.interface),
        "constants": {name: constant_to_json(constant) for name, constant in graph.constants.items()},
        "nodes": [_node_to_json(node, names) for node in graph.fx.nodes],
    }


def constant_to_json(constant: Constant) -> dict[str, Any]:
    """Dtype, shape, the format of a quantized part, and what was done to it."""
    form = str(constant.format) if constant.format is not None else None
    result: dict[str, Any] = {"dtype": dtype_name(constant.dtype), "shape": list(constant.shape), "format": form}
    return result | ({"log": list(constant.log)} if constant.log else {})


def _interface_to_json(interface: Interface) -> dict[str, Any]:
    return {
        "inputs": interface.inputs,
        "outputs": interface.outputs,
        "examples": {name: _example_to_json(tensor) for name, tensor in interface.examples.items()},
        # In the order of the tracer's own names, by which sympy sorts the terms of a size.
        "symbols": [name for _, name in sorted(interface.symbols.items())],
        "kind": interface.kind,
    }


def _example_to_json(tensor: Tensor) -> dict[str, Any]:
    """Small and exact: the bytes in base64, or one number where all elements are that number."""
    stored = tensor.detach().contiguous()
    result: dict[str, Any] = {"dtype": dtype_name(stored.dtype), "shape": list(stored.shape)}
    if stored.numel() and bool((stored == stored.reshape(-1)[0]).all()):
        return result | {"fill": stored.reshape(-1)[0].item()}
    return result | {"base64": base64.b64encode(stored.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()}


def _node_to_json(node: fx.Node, names: dict[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "get_attr":
        result["target"] = str(node.target)
    elif node.op == "call_function":
        stored = name_of(node.target)
        if stored is None:
            raise ArtifactError(
                f"{node.name} ({node.meta.get('source', '')}): expected an operator of the allow-list, got "
                f"{operator_name(node.target)}; it cannot be stored"
            )
        result["target"] = stored
    if node.op in ("call_function", "output"):
        result["args"] = [_argument_to_json(value, node, names) for value in node.args]
        result["kwargs"] = {key: _argument_to_json(value, node, names) for key, value in node.kwargs.items()}
    result["type"] = _type_to_json(node.meta.get("val"), names)
    result["source"] = node.meta.get("source", "")
    result["passes"] = list(node.meta.get("passes", ()))
    if origins(node):
        result["origins"] = list(origins(node))
    return result


def _type_to_json(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": dtype_name(value.dtype), "shape": [_size_to_json(size, names) for size in value.shape]}
    if isinstance(value, tuple | list):
        return [_type_to_json(item, names) for item in value]
    return {"size": _size_to_json(value, names)} if isinstance(value, int | torch.SymInt) else None


def _size_to_json(value: int | torch.SymInt, names: dict[str, str]) -> Any:
    def listed(size: Size) -> Any:
        return [listed(item) for item in size] if isinstance(size, tuple) else size

    return listed(size_expression(value, names))


def _argument_to_json(value: Any, node: fx.Node, names: dict[str, str]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple | list):
        items = [_argument_to_json(item, node, names) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, slice):
        return {"slice": [_argument_to_json(item, node, names) for item in (value.start, value.stop, value.step)]}
    return _object_to_json(value, node, names)


def _object_to_json(value: Any, node: fx.Node, names: dict[str, str]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.SymInt):
        return {"size": _size_to_json(value, names)}
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": "strided"}
    if isinstance(value, torch.device) and value.type in ("cpu", "meta"):
        return {"device": "cpu"}
    raise ArtifactError(
        f"{node.name} ({node.meta.get('source', '')}): expected nodes, numbers, strings, dtypes and lists as arguments, "
        f"got {type(value).__name__} {value}; it cannot be stored"
    )


def check_graph_json(data: Any) -> None:
    """Refuse a stored graph that could do anything but call allow-listed operators; cheap, and builds nothing.

    Raises:
        ArtifactError: naming the node and what it asked for.
    """
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or not isinstance(data.get("interface"), dict):
        raise ArtifactError("graph.json: expected an object with interface, constants and nodes; the file was altered: compile again")
    for node in data["nodes"]:
        if not isinstance(node, dict) or not isinstance(node.get("name"), str):
            raise ArtifactError(f"graph.json: expected nodes with names, got {str(node)[:60]!r}; compile again")
        if node.get("op") not in ("placeholder", "get_attr", "call_function", "output"):
            raise ArtifactError(
                f"graph.json: {node['name']}: expected a placeholder, constant, call or output, got {node.get('op')!r}; compile again"
            )
        check_operator(node.get("target"), f"graph.json: {node['name']}") if node["op"] == "call_function" else None


def check_operator(name: Any, where: str) -> None:
    """Refuse an operator that is not on the allow-list.

    Raises:
        ArtifactError: naming it.
    """
    if not isinstance(name, str) or name not in ALLOWED:
        raise ArtifactError(
            f"{where}: expected an operator of the allow-list (qcompile/ir/allowed.py), got {name!r}; do not run this "
            "artifact, compile the model again"
        )


def memory_format_of(name: Any, where: str) -> torch.memory_format:
    """The memory format called `contiguous_format`, `preserve_format` or `channels_last`.

    Raises:
        ArtifactError: for any other name.
    """
    found = _MEMORY_FORMATS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ArtifactError(f"{where}: expected a memory format of {', '.join(_MEMORY_FORMATS)}, got {name!r}; compile again")
    return found
