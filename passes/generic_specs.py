"""Specifications of operators that a backend serves as they come: arithmetic over shapes that broadcast, copies, what rows sum to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.allowed import name_of
from qcompile.ir.lowered import KernelSpec, item_operand
from qcompile.ir.operands import bind_arguments, output_name

aten = torch.ops.aten
Given = Mapping[str, Any]
Stored = Callable[[Tensor], str]

POINTWISE: dict[Any, str] = {
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub", aten.rsub.Scalar: "rsub",
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div", aten.true_divide.Tensor: "div",
    aten.neg.default: "neg", aten.abs.default: "abs", aten.reciprocal.default: "reciprocal", aten.exp.default: "exp",
    aten.tanh.default: "tanh", aten.erf.default: "erf", aten.sigmoid.default: "sigmoid", aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt", aten.sin.default: "sin", aten.cos.default: "cos", aten.log.default: "log", aten.square.default: "square",
    aten.pow.Tensor_Scalar: "pow", aten.clamp_min.default: "clamp_min", aten.clamp_max.default: "clamp_max",
    aten.maximum.default: "maximum", aten.minimum.default: "minimum",
    aten.eq.Tensor: "eq", aten.eq.Scalar: "eq", aten.ne.Tensor: "ne", aten.ne.Scalar: "ne", aten.lt.Tensor: "lt", aten.lt.Scalar: "lt",
    aten.le.Tensor: "le", aten.le.Scalar: "le", aten.gt.Tensor: "gt", aten.gt.Scalar: "gt", aten.ge.Tensor: "ge", aten.ge.Scalar: "ge",
    aten.logical_and.default: "and", aten.logical_or.default: "or", aten.logical_not.default: "not",
    aten.bitwise_and.Tensor: "and", aten.__and__.Tensor: "and", aten.bitwise_or.Tensor: "or",
    aten.__or__.Tensor: "or", aten.where.self: "where", aten.masked_fill.Scalar: "masked_fill", aten.to.dtype: "cast",
    aten._to_copy.default: "cast",
}  # fmt: skip
"""Operator -> what is done with each number."""
_OF_BOOLS = ("and", "or", "not")
"""Functions that mean the same of whole numbers only where these are bools."""
_NOT_NUMBERS = ("dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "memory_format")
"""Arguments of a cast; the result says what it is."""


def generic_spec(node: fx.Node, stored: Stored) -> KernelSpec | None:
    """The specification of a call, whatever sizes it has; None for an operator, or a form of it, that none is made for.

    Args:
        node: a call.
        stored: how a tensor is stored, as specifications have it.
    """
    name = name_of(node.target) if node.target in POINTWISE or node.target in _SHAPED else None
    if name is None:
        return None
    given = bind_arguments(name, node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    made = _pointwise(node, given) if node.target in POINTWISE else _SHAPED[node.target](node, given)
    if made is None:
        return None
    operator, options = made
    values = _tensors(given) | {output_name(place): value for place, value in enumerate(_results(node))}
    if not all(isinstance(value, Tensor) and _dense(value) for value in values.values()):
        return None
    formats = tuple(sorted((key, stored(value)) for key, value in values.items()))
    return KernelSpec(operator, (), formats, tuple(sorted(options.items())))


def _results(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _tensors(given: Given) -> dict[str, Any]:
    """The tensors of a call by operand, those of lists too."""
    lists = {key: value for key, value in given.items() if isinstance(value, list | tuple)}
    items = {item_operand(key, place): item for key, listed in lists.items() for place, item in enumerate(listed)}
    return {key: value.meta["val"] for key, value in (*given.items(), *items.items()) if isinstance(value, fx.Node)}


def _dense(value: Tensor) -> bool:
    """Whether neighbours along the last axis lie side by side in memory."""
    return value.dim() == 0 or value.shape[-1] == 1 or value.stride(-1) == 1


Made = tuple[str, dict[str, Any]] | None


def _pointwise(node: fx.Node, given: Given) -> Made:
    function, out = POINTWISE[node.target], node.meta["val"]
    if function == "cast":
        given = {key: value for key, value in given.items() if key not in _NOT_NUMBERS}
    scalars = {key: value for key, value in given.items() if not isinstance(value, fx.Node)}
    if not all(isinstance(value, int | float) for value in scalars.values()):
        return None
    if function in _OF_BOOLS and any(value.dtype != torch.bool for value in _tensors(given).values()):
        return None
    if out.dtype == torch.bool and function in ("add", "sub", "mul"):
        return None  # arithmetic of bools means something else
    return "pointwise", {"function": function} | scalars


def _last(node: fx.Node, dim: object) -> int | None:
    """An axis of the first result counted from the end, if it is a number."""
    rank = _results(node)[0].dim()
    return None if not isinstance(dim, int) else dim if dim < 0 else dim - rank


def _cat(node: fx.Node, given: Given) -> Made:
    tensors, dim = given["tensors"], _last(node, given.get("dim", 0))
    ranks = {item.meta["val"].dim() for item in tensors}
    return ("cat", {"dim": dim}) if ranks == {node.meta["val"].dim()} and dim is not None else None


def _index(node: fx.Node, given: Given) -> Made:
    """One list of places along one axis."""
    places = [axis for axis, index in enumerate(given["indices"]) if index is not None]
    if len(places) != 1 or given["indices"][places[0]].meta["val"].dim() != 1:
        return None
    return ("select_places", {"dim": _last(node, places[0])})


def _index_select(node: fx.Node, given: Given) -> Made:
    return ("select_places", {"dim": _last(node, given["dim"])}) if given["index"].meta["val"].dim() == 1 else None


def _gather(node: fx.Node, given: Given) -> Made:
    x, index = given["x"].meta["val"], given["index"].meta["val"]
    same = list(map(str, x.shape[:-1])) == list(map(str, index.shape[:-1])) and x.dim() == index.dim()
    return ("gather_places", {}) if same and _last(node, given["dim"]) == -1 else None


def _softmax(node: fx.Node, given: Given) -> Made:
    return ("softmax", {}) if _last(node, given["dim"]) == -1 and given.get("dtype") in (None, node.meta["val"].dtype) else None


def _sum(node: fx.Node, given: Given) -> Made:
    x, dims = given["x"].meta["val"], given.get("dim")
    if not isinstance(dims, list | tuple) or [dim % x.dim() for dim in dims] != [x.dim() - 1] or given.get("dtype") is not None:
        return None
    return ("row_sum", {"mean": node.target is aten.mean.dim})


def _topk(node: fx.Node, given: Given) -> Made:
    plain = _last(node, given.get("dim", -1)) == -1 and given.get("largest", True) and isinstance(given["k"], int)
    return ("greatest", {"k": given["k"]}) if plain else None


_SHAPED: dict[Any, Callable[[fx.Node, Given], Made]] = {
    aten.cat.default: _cat,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.softmax.int: _softmax,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _sum,
    aten.topk.default: _topk,
}
