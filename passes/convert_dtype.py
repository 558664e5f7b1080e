"""Models are traced in float32; this pass moves them to the dtype the target computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import PassError, PipelineError
from qcompile.ir.constants import Cast, uncast, widened
from qcompile.ir.graph import Graph, operator_name
from qcompile.ir.verify import where
from qcompile.passes.base import Pass, PassContext
from qcompile.quant.scheme import DTYPE_NAMES

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ConvertDtype(Pass):
    """Compute in `to` (fp32, bf16, fp16, fp64): float constants are cast, frequencies of rotary positions stay float32."""

    name: ClassVar[str] = "convert-dtype"
    exact: ClassVar[bool] = False
    to: str = "fp32"

    def is_exact(self, ctx: PassContext) -> bool:
        """Exact where nothing is narrowed."""
        del ctx
        return self.to in ("fp32", "fp64")

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Cast constants, rewrite dtype arguments, and compute every value anew."""
        del ctx
        if self.to not in DTYPE_NAMES:
            raise PipelineError(f"pass {self.name}: option to: expected one of {', '.join(DTYPE_NAMES)}, got {self.to!r}")
        return convert(graph, DTYPE_NAMES[self.to])


def convert(graph: Graph, dtype: torch.dtype, *, values: bool = True) -> bool:
    """Move `graph` to `dtype`; true iff anything had another float dtype.

    Without `values` the fake values of calls stay what they were: enough for a graph that is only to be run.
    """
    kept = set() if dtype == torch.float64 else _position_arithmetic(graph)
    # A cache is stored in a dtype of its own, and a cast copy of it is not what is written; float64 is there to see no rounding at all.
    kept_as_is = set() if dtype == torch.float64 else {*_rotations(graph), *_cache_tables(graph), *_static_scales(graph), *graph.states}
    changed = False
    for node in graph.nodes:
        if node in kept_as_is:
            continue
        if node in kept:
            changed |= _cast_result(graph, node, kept, dtype)
        elif node.op == "get_attr":
            changed |= _convert_constant(graph, node, dtype)
        elif node.op == "placeholder":
            changed |= _cast_result(graph, node, kept, dtype)
        elif node.op == "call_function":
            changed |= _convert_arguments(node, dtype)
    if changed and values:
        propagate(graph)
    return changed


def _rotations(graph: Graph) -> set[fx.Node]:
    """Matrices of online rotations: float32 always, because rounded further they would not be orthogonal."""
    found = (call.args[1] for call in graph.calls(torch.ops.qcompile.hadamard.default))
    return {node for node in found if isinstance(node, fx.Node) and node.op == "get_attr"}


def _static_scales(graph: Graph) -> set[fx.Node]:
    """Scales of activations that are constants: codes are made and read by the number that is stored."""
    found = (call.args[1] for call in graph.calls(*_SCALED))
    return {node for node in found if isinstance(node, fx.Node) and node.op == "get_attr"}


def _cache_tables(graph: Graph) -> set[fx.Node]:
    """Tables of cache forms, which come as lists: they are stored as the form says, and widened where they are used."""
    calls = graph.calls(*_CACHE_OPERATORS)
    lists = (value for call in calls for value in (*call.args, *call.kwargs.values()) if isinstance(value, list | tuple))
    return {node for nodes in lists for node in nodes if isinstance(node, fx.Node)}


def _position_arithmetic(graph: Graph) -> set[fx.Node]:
    """What sines and cosines of positions are computed from: float32 always, because half precision cannot count to 300."""
    kept = {call.args[1] for call in graph.calls(torch.ops.qcompile.rotary_table.default)}
    for wave in graph.calls(torch.ops.aten.cos.default, torch.ops.aten.sin.default):
        behind: set[fx.Node] = set()
        pending = [wave]
        while pending:
            node = pending.pop()
            if node not in behind and node.op != "placeholder":
                behind.add(node)
                pending += node.all_input_nodes
        if not any(node.target in _LEARNED for node in behind):
            kept |= behind
    return kept  # type: ignore[return-value]


_CACHE_OPERATORS = (
    torch.ops.qcompile.pack_vectors.default, torch.ops.qcompile.settle.default, torch.ops.qcompile.cache_attend_packed.default,
    torch.ops.qcompile.attend_settled.default, torch.ops.qcompile.attend_ranked.default,
    torch.ops.qcompile.attend_rematerialized.default, torch.ops.qcompile.attend_settled_sources.default,
)  # fmt: skip
_SCALED = (
    torch.ops.qcompile.quantize_static.default, torch.ops.qcompile.dequantize_activation.default, torch.ops.qcompile.integer_linear.default,
    torch.ops.qcompile.integer_conv2d.default,
)  # fmt: skip
_LEARNED = (torch.ops.aten.linear.default, torch.ops.aten.embedding.default, torch.ops.aten.conv2d.default)


def _convert_constant(graph: Graph, node: fx.Node, dtype: torch.dtype) -> bool:
    constant = graph.constants[str(node.target)]
    if constant.format is not None or constant.dtype not in _FLOATS or constant.dtype == dtype:
        return False
    if dtype == torch.float64:
        graph.bind(str(node.target), widened(constant))
        return True
    precise = uncast(constant)
    graph.bind(str(node.target), precise if precise.dtype == dtype else precise.then(Cast(dtype)))
    return True


def _cast_result(graph: Graph, node: fx.Node, kept: set[fx.Node], dtype: torch.dtype) -> bool:
    """What keeps its own dtype (a caller's float input, position arithmetic) is cast where the rest of the graph reads it."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.dtype == dtype:
        return False
    users = [
        user
        for user in node.users
        if user not in kept and user.target not in (torch.ops.aten.to.dtype, torch.ops.qcompile.rotary_table.default, *_CACHE_OPERATORS)
    ]
    if not users:
        return False
    after = graph.placeholders[-1].next if node.op == "placeholder" else node.next
    cast = graph.insert(after, torch.ops.aten.to.dtype, (node, dtype), source=node)
    for user in users:
        user.replace_input_with(node, cast)
    return True


def _convert_arguments(node: fx.Node, dtype: torch.dtype) -> bool:
    """Float dtypes in arguments follow, whether the call casts, fills or dequantizes."""

    def swap(value: Any) -> Any:
        return dtype if isinstance(value, torch.dtype) and value in _FLOATS else value

    args = tuple(swap(argument) for argument in node.args)
    kwargs = {key: swap(value) for key, value in node.kwargs.items()}
    if args == node.args and kwargs == node.kwargs:
        return False
    node.args, node.kwargs = args, kwargs
    return True


def propagate(graph: Graph) -> None:
    """Compute the fake value of every call anew.

    Raises:
        PassError: naming the first node whose operator does not accept what now comes in.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            try:
                node.meta["val"] = graph.infer(node)
            except Exception as error:
                raise PassError(
                    f"convert-dtype: {where(node)}: expected {operator_name(node.target)} to accept its arguments, got "
                    f"{error}; this model mixes dtypes on purpose, compile it for fp32"
                ) from error
