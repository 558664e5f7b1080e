"""Logits of the last tokens alone: what stands in front of the head is cut to as many tokens as an input asks for.

The input has a default, so that a file runs without it as any other: 0 keeps all tokens, n the last n of each row (`logits_to_keep`, as
transformers has it). A prompt then pays for the head once, and not for each of its tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from torch import Tensor, fx

from qcompile.exporters.onnx.emitter import Emitter, Value
from qcompile.ir.allowed import name_of
from qcompile.ir.graph import Graph
from qcompile.runtime.engines.onnxruntime import LOGITS_TO_KEEP

_HEADS = ("aten.linear.default", *(f"qcompile.{kind}_linear.default" for kind in ("quantized", "integer", "float8")))
_NUMBERWISE = tuple(f"aten.{name}" for name in (
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "tanh.default", "_to_copy.default", "clamp.default",
))  # fmt: skip
"""What may come behind the head: arithmetic on each number alone, as long as the other operand is no result."""
_END = (1 << 63) - 1


def head_of(graph: Graph) -> fx.Node | None:
    """The product that logits [B, S, V] come from by arithmetic on each number alone; None if there is none."""
    results: Any = graph.output.args[0]
    node = results[0]
    while len(node.users) == 1 and node.op == "call_function":
        read = _results_read(node)
        if name_of(node.target) in _HEADS:
            return node if read and all(_per_token(item) for item in read) else None
        if name_of(node.target) not in _NUMBERWISE or len(read) != 1:
            return None
        node = read[0]
    return None


def _results_read(node: fx.Node) -> list[fx.Node]:
    return [item for item in node.all_input_nodes if item.op != "get_attr"]


def _per_token(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 3


def kept_input(e: Emitter) -> Value:
    """The input int64 [1], with the default 0."""
    shape = ir.Shape([1])
    value = ir.Value(name=LOGITS_TO_KEEP, shape=shape, type=ir.TensorType(ir.DataType.INT64))
    value.const_value = ir.tensor([0], dtype=ir.DataType.INT64, name=LOGITS_TO_KEEP)
    e.initializers[LOGITS_TO_KEEP] = value
    return value


@contextlib.contextmanager
def last_tokens(e: Emitter, head: fx.Node, kept: Value) -> Iterator[None]:
    """While the head is written, what it reads has only so many last tokens [B, n, K]."""
    read = _results_read(head)
    before = {node: e.results[node] for node in read}
    first, end, axis = e.op("Neg", kept), e.ints([_END]), e.ints([1])
    e.results |= {node: e.op("Slice", e.value(node), first, end, axis) for node in read}
    try:
        yield
    finally:
        e.results |= before
