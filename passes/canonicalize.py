"""Traced graphs carry one idea in many spellings; this pass leaves one of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.constants import Permute
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
_SAME = (
    aten.lift_fresh_copy.default,
    aten.detach.default,
    aten.detach_.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_async")
_SHAPED = (aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default)
_PLACED = ("device", "pin_memory", "layout")


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove no-op casts, copies, slices and assertions; write every linear as `linear(x, W[N, K], bias)`; bake in no device."""

    name: ClassVar[str] = "canonicalize"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Rewrite node by node, in order, so that each rule sees its arguments in canonical form."""
        changed = False
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            for rule in RULES:
                if rule(graph, node):
                    changed = True
                    break
            if not ctx.spend():
                break
        return changed


def drop_check(graph: Graph, node: fx.Node) -> bool:
    """Assertions of the tracer hold by construction and would fix dtype and device."""
    if getattr(node.target, "__name__", "").split(".")[0] in _CHECKS and not node.users:
        graph.fx.erase_node(node)
        return True
    return False


def drop_copy(graph: Graph, node: fx.Node) -> bool:
    """In a functional graph a copy is its argument; so is dropout at inference."""
    inactive = node.target is aten.dropout.default and not node.args[2]
    if node.target in _SAME or inactive:
        graph.replace(node, node.args[0])  # type: ignore[arg-type]
        return True
    return False


def plain_cast(graph: Graph, node: fx.Node) -> bool:
    """A cast to the dtype its argument has is its argument (else a later add would read the cast); others become `to.dtype`."""
    if node.target not in _CASTS:
        return False
    argument, value = node.args[0], node.meta["val"]
    assert isinstance(argument, fx.Node)
    if argument.meta["val"].dtype == value.dtype:
        graph.replace(node, argument)
        return True
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return False
    graph.replace(node, graph.insert(node, aten.to.dtype, (argument, value.dtype), source=node))
    return True


def drop_placement(graph: Graph, node: fx.Node) -> bool:
    """A graph runs wherever its engine puts it: no device, layout or pinning in factories."""
    del graph
    kept = {key: value for key, value in node.kwargs.items() if key not in _PLACED}
    if len(kept) == len(node.kwargs):
        return False
    node.kwargs = kept
    return True


def drop_full_slice(graph: Graph, node: fx.Node) -> bool:
    """A slice of everything is its argument."""
    if node.target is not aten.slice.Tensor:
        return False
    argument, dim, start, end, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])[:5]
    size = argument.meta["val"].shape[dim]  # type: ignore[union-attr]
    whole = end is None or (isinstance(end, int) and (end >= 1 << 62 or (isinstance(size, int) and end >= size)))
    if start in (None, 0) and whole and step == 1:
        graph.replace(node, argument)  # type: ignore[arg-type]
        return True
    return False


def drop_same_shape(graph: Graph, node: fx.Node) -> bool:
    """A view, reshape or expand to the shape its argument has is its argument; `view` becomes `reshape`, which never refuses."""
    if node.target not in _SHAPED:
        return False
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    if _sizes(argument) == _sizes(node):
        graph.replace(node, argument)
        return True
    if node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default
        return True
    return False


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def drop_neutral(graph: Graph, node: fx.Node) -> bool:
    """`x + 0`, `x · 1`, `x / 1` are x where the dtype agrees."""
    target: Any = node.target
    neutral = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}.get(target)
    if neutral is None or len(node.args) != 2 or node.kwargs:
        return False
    left, right = node.args
    if isinstance(right, fx.Node) or right != neutral or not isinstance(left, fx.Node):
        return False
    if left.meta["val"].dtype != node.meta["val"].dtype:
        return False
    graph.replace(node, left)
    return True


def drop_nothing(graph: Graph, node: fx.Node) -> bool:
    """Parts without elements are left out of a concatenation; one part alone is the result."""
    if node.target is not aten.cat.default:
        return False
    options: tuple[Any, ...] = (*node.args, 0)
    parts, axis = options[:2]
    kept = [part for part in parts if not _is_zero(part.meta["val"].shape[axis])]
    if len(kept) == len(parts) or not kept:
        return False
    if len(kept) == 1 and kept[0].meta["val"].dtype == node.meta["val"].dtype:
        graph.replace(node, kept[0])
    else:
        node.args = (kept, axis)
    return True


def _is_zero(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 0


def transposed_constant(graph: Graph, node: fx.Node) -> bool:
    """A transposed or permuted constant is a constant with one more entry in its log."""
    argument = node.args[0] if node.args else None
    constant = graph.constant(argument)
    if constant is None:
        return False
    order = _axis_order(node, len(constant.shape))
    if order is None:
        return False
    assert isinstance(argument, fx.Node)
    name = f"{argument.target}_{'x'.join(map(str, order))}"
    existing = next((found for found in graph.fx.find_nodes(op="get_attr", target=name)), None)
    graph.replace(node, existing or graph.add_constant(name, constant.then(Permute(order)), source=node))
    return True


def _axis_order(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    order = list(range(dims))
    if node.target is aten.t.default and dims == 2:
        return (1, 0)
    if node.target is aten.transpose.int:
        first, second = (int(axis) % dims for axis in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    if node.target is aten.permute.default:
        return tuple(int(axis) % dims for axis in node.args[1])  # type: ignore[union-attr, arg-type]
    return None


def one_linear(graph: Graph, node: fx.Node) -> bool:
    """`addmm(b, x, W)` and `matmul(x, W)` with a constant matrix W [K, N] are `linear(x, Wᵀ, b)`; so is `linear` with two arguments."""
    if node.target is aten.linear.default and len(node.args) + len(node.kwargs) == 2:
        node.args = (*node.args, None)
        return True
    parts = _as_linear(graph, node)
    if parts is None:
        return False
    x, weight, bias = parts
    constant = graph.constants[str(weight.target)]
    flipped = constant.transforms and constant.transforms[-1] == Permute((1, 0))
    straight = type(constant)(constant.source, constant.transforms[:-1], constant.format) if flipped else constant.then(Permute((1, 0)))
    name = str(weight.target).removesuffix("_1x0") if flipped else f"{weight.target}_1x0"
    found = next((item for item in graph.fx.find_nodes(op="get_attr", target=name)), None)
    turned = found or graph.add_constant(name, straight, source=weight)
    graph.replace(node, graph.insert(node, aten.linear.default, (x, turned, bias), source=node))
    return True


def _as_linear(graph: Graph, node: fx.Node) -> tuple[Any, fx.Node, Any] | None:
    if node.kwargs:
        return None
    if node.target is aten.addmm.default and len(node.args) == 3:
        bias, x, weight = node.args
        usable = isinstance(bias, fx.Node) and len(bias.meta["val"].shape) == 1
    elif node.target in (aten.matmul.default, aten.mm.default) and len(node.args) == 2:
        bias, (x, weight) = None, node.args
        usable = isinstance(x, fx.Node) and isinstance(x.meta["val"], Tensor) and x.meta["val"].dim() >= 2
    else:
        return None
    constant = graph.constant(weight)
    if not usable or constant is None or len(constant.shape) != 2 or graph.constant(x) is not None:
        return None
    assert isinstance(weight, fx.Node)
    return x, weight, bias


RULES: tuple[Callable[[Graph, fx.Node], bool], ...] = (
    drop_check, drop_copy, plain_cast, drop_placement, drop_full_slice, drop_same_shape, drop_neutral, drop_nothing,
    transposed_constant, one_linear,
)  # fmt: skip
