"""What a legal graph is; run after every pass by the manager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qcompile.errors import VerifyError
from qcompile.ir.allowed import name_of
from qcompile.ir.graph import operator_name

if TYPE_CHECKING:
    from qcompile.ir.graph import Graph


def verify(graph: Graph, *, propagate: bool = False) -> None:
    """Check structure, operators, constants and values; with `propagate` recompute every shape and compare.

    Raises:
        VerifyError: naming the node, what was expected and what came.
    """
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.fx.nodes:
        _check_order(node, seen)
        if node.name in names:
            raise VerifyError(f"verify: {node.name}: expected a name of its own, got one that an earlier node has")
        names.add(node.name)
        seen.add(node)
        if node.op == "output":
            _check_output(graph, node)
        elif node.op == "get_attr":
            _check_constant(graph, node)
        elif node.op == "call_function":
            _check_call(node, propagate=propagate, graph=graph)
        elif node.op != "placeholder":
            raise VerifyError(f"verify: {node.name}: expected a placeholder, constant, call or output, got {node.op}")


def where(node: fx.Node) -> str:
    """`name (file:line)` for messages."""
    source = node.meta.get("source")
    return f"{node.name} ({source})" if source else node.name


def _check_order(node: fx.Node, seen: set[fx.Node]) -> None:
    for used in node.all_input_nodes:
        if used not in seen:
            raise VerifyError(f"verify: {where(node)}: expected its argument {used.name} before it, got it after or in another graph")


def _check_output(graph: Graph, node: fx.Node) -> None:
    outputs = node.args[0]
    if not isinstance(outputs, tuple | list) or not all(isinstance(item, fx.Node) for item in outputs):
        raise VerifyError(f"verify: output: expected a tuple of nodes, got {outputs}")
    if node is not list(graph.fx.nodes)[-1]:
        raise VerifyError("verify: output: expected to be the last node, got nodes after it")


def _check_constant(graph: Graph, node: fx.Node) -> None:
    constant = graph.constants.get(str(node.target))
    if constant is None:
        raise VerifyError(f"verify: {where(node)}: expected the constant {node.target!r}, got none of that name")
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or tuple(value.shape) != constant.shape or value.dtype != constant.dtype:
        raise VerifyError(
            f"verify: {where(node)}: expected a value of {constant.dtype} {constant.shape} like its constant, got {_describe(value)}"
        )


def _check_call(node: fx.Node, *, propagate: bool, graph: Graph) -> None:
    if name_of(node.target) is None:
        raise VerifyError(
            f"verify: {where(node)}: expected an operator of the allow-list, got {operator_name(node.target)}; replace it, "
            "or add it to qcompile/ir/allowed.py if it is functional"
        )
    schema = getattr(node.target, "_schema", None)
    if "val" not in node.meta and not (schema is not None and not schema.returns):
        raise VerifyError(f"verify: {where(node)}: expected meta['val'], got none; make nodes with Graph.insert")
    if propagate:
        fresh = graph.infer(node)
        if _signature(fresh) != _signature(node.meta.get("val")):
            raise VerifyError(f"verify: {where(node)}: expected the value {_describe(fresh)}, got {_describe(node.meta.get('val'))}")


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, tuple(str(size) for size in value.shape))
    if isinstance(value, tuple | list):
        return tuple(_signature(item) for item in value)
    return str(value) if isinstance(value, torch.SymInt) else value


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
