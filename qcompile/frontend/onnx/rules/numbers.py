"""Arithmetic on numbers that are known while tracing: sizes stay symbolic, and nothing of it appears in the graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qcompile.frontend.onnx.node import Node, dtype_of
from qcompile.frontend.onnx.registry import number_rule
from qcompile.frontend.onnx.values import NotNumbersError, Numbers, RefusalError, is_symbolic, numbers_of, objects, rounded

_sym: Any = torch  # its functions of symbolic numbers have no annotations


def _known(condition: Any) -> bool | None:
    """Whether a comparison of sizes always or never holds; None if it depends on the sizes."""
    if not is_symbolic(condition):
        return bool(condition)
    if statically_known_true(condition):
        return True
    return False if statically_known_true(_sym.sym_not(condition)) else None


def _divide(left: Any, right: Any) -> Any:
    """Integers are divided towards zero, as in C."""
    if isinstance(left, float) or isinstance(right, float) or isinstance(left, torch.SymFloat):
        return _quotient(left, right)
    if _known(left >= 0) and _known(right > 0):
        return left // right
    if is_symbolic(left) or is_symbolic(right):
        raise RefusalError(f"expected sizes of 0 and more in a division, got {left} / {right}")
    if right == 0:
        raise RefusalError("expected a divisor, got 0")
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _quotient(left: Any, right: Any) -> Any:
    if not is_symbolic(right) and right == 0:
        return math.nan if left == 0 or left != left else math.copysign(math.inf, left)
    return left / right


def _power(left: Any, right: Any) -> Any:
    if is_symbolic(left) or is_symbolic(right):
        raise NotNumbersError
    return left**right


def _min_of(left: Any, right: Any) -> Any:
    return _sym.sym_min(left, right) if is_symbolic(left) or is_symbolic(right) else min(left, right)


def _max_of(left: Any, right: Any) -> Any:
    return _sym.sym_max(left, right) if is_symbolic(left) or is_symbolic(right) else max(left, right)


def _both(left: Any, right: Any) -> Any:
    first, second = _known(left), _known(right)
    if False in (first, second):
        return False
    if None in (first, second):
        raise RefusalError("expected conditions that do not depend on sizes, got one that does")
    return True


def _either(left: Any, right: Any) -> Any:
    return not _both(not _decided(left), not _decided(right))


def _decided(condition: Any) -> bool:
    known = _known(condition)
    if known is None:
        raise RefusalError(f"expected a condition that does not depend on sizes, got {condition}")
    return known


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _divide, "Pow": _power, "Min": _min_of, "Max": _max_of,
    "Equal": operator.eq, "Less": operator.lt, "LessOrEqual": operator.le, "Greater": operator.gt, "GreaterOrEqual": operator.ge,
    "And": _both, "Or": _either,
}  # fmt: skip
_TO_BOOL = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"})


def _plain(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of numbers that are not symbolic."""

    def apply(item: Any) -> Any:
        if is_symbolic(item):
            raise NotNumbersError
        return function(item)

    return apply


def _half_to_even(item: Any) -> Any:
    return float(round(item)) if math.isfinite(item) else item


_UNARY: dict[str, Callable[[Any], Any]] = {
    "Neg": operator.neg, "Abs": lambda item: _max_of(item, -item), "Not": lambda item: not _decided(item), "Identity": lambda item: item,
    "Sqrt": _plain(lambda item: math.sqrt(item) if item >= 0 else math.nan), "Reciprocal": lambda item: _quotient(1.0, item),
    "Rsqrt": _plain(lambda item: 1 / math.sqrt(item) if item > 0 else math.inf if item == 0 else math.nan),
    "Floor": lambda item: math.floor(item), "Ceil": lambda item: math.ceil(item), "Round": _plain(_half_to_even),
    "Exp": _plain(math.exp), "Log": _plain(lambda item: math.log(item) if item > 0 else (-math.inf if item == 0 else math.nan)),
}  # fmt: skip


def _made(array: Any, dtype: torch.dtype) -> Numbers:
    shaped = np.asarray(array, dtype=object)
    return Numbers(objects((rounded(item, dtype) for item in shaped.reshape(-1)), shaped.shape), dtype)


def _wrapped(item: Any, dtype: torch.dtype) -> Any:
    """Integers that do not fit their type are left to tensors."""
    if not dtype.is_floating_point and dtype != torch.bool and not is_symbolic(item):
        limits = torch.iinfo(dtype)
        if not limits.min <= item <= limits.max:
            raise NotNumbersError
    return item


@number_rule(*_BINARY)
def binary(node: Node) -> Numbers:
    """Element by element, with broadcasting; `Min` and `Max` of any number of operands."""
    found = node.numbers(0)
    if len(node.inputs) == 1:
        return found
    function = np.frompyfunc(_BINARY[node.operator], 2, 1)
    array = found.array
    for index in range(1, len(node.inputs)):
        array = function(array, node.numbers(index).array)
    dtype = torch.bool if node.operator in _TO_BOOL else found.dtype
    if dtype == torch.bool:  # a comparison of sizes may stay symbolic
        shaped = np.asarray(array, dtype=object)
        return Numbers(objects(shaped.reshape(-1), shaped.shape), dtype)
    checked = np.frompyfunc(lambda item: _wrapped(item, dtype), 1, 1)
    return _made(checked(array), dtype)


@number_rule(*_UNARY)
def unary(node: Node) -> Numbers:
    """Element by element."""
    found = node.numbers(0)
    return _made(np.frompyfunc(_UNARY[node.operator], 1, 1)(found.array), found.dtype)


@number_rule("Mod")
def modulo(node: Node) -> Numbers:
    """The remainder has the divisor's sign; `fmod` is left to tensors."""
    left, right = node.numbers(0), node.numbers(1)
    if node.flag("fmod") or left.dtype.is_floating_point:
        raise NotNumbersError
    return _made(np.frompyfunc(operator.mod, 2, 1)(left.array, right.array), left.dtype)


@number_rule("Cast")
def cast(node: Node) -> Numbers:
    """To another type; floats are cut towards zero. Narrow types have rules of their own, on tensors."""
    found, dtype = node.numbers(0), dtype_of(node.integer("to", 0))
    node.ignore("saturate", "round_mode")
    if dtype not in (torch.int64, torch.int32, torch.float32, torch.float64, torch.bool):
        raise NotNumbersError

    def convert(item: Any) -> Any:
        if not is_symbolic(item):
            return _wrapped(rounded(item, dtype), dtype)
        if dtype == torch.bool:
            raise NotNumbersError
        if dtype.is_floating_point:
            return _sym.sym_float(item)
        return (
            math.trunc(item) if isinstance(item, torch.SymFloat) else _sym.sym_ite(item, 1, 0) if isinstance(item, torch.SymBool) else item
        )

    return _made(np.frompyfunc(convert, 1, 1)(found.array), dtype)


@number_rule("Where")
def where(node: Node) -> Numbers:
    """A condition on sizes that always or never holds chooses; any other makes a conditional size."""
    condition, yes, no = (node.numbers(index) for index in range(3))

    def choose(test: Any, first: Any, second: Any) -> Any:
        known = _known(test)
        if known is not None:
            return first if known else second
        return _sym.sym_ite(test, first, second)

    return _made(np.frompyfunc(choose, 3, 1)(condition.array, yes.array, no.array), yes.dtype)


@number_rule("Range")
def arange(node: Node) -> Numbers:
    """Numbers from start below limit; long ones, and those of symbolic length, are tensors."""
    start, limit, delta = (node.number(index) for index in range(3))
    dtype = node.numbers(0).dtype
    if any(is_symbolic(item) for item in (start, limit, delta)) or delta == 0 or dtype.is_floating_point:
        raise NotNumbersError
    if abs(limit - start) // abs(delta) > 64:
        raise NotNumbersError
    return numbers_of(range(start, limit, delta), dtype)


_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "ReduceProd": operator.mul, "ReduceSum": operator.add, "ReduceMin": _min_of, "ReduceMax": _max_of,
}  # fmt: skip


@number_rule(*_REDUCTIONS)
def reduce(node: Node) -> Numbers:
    """Over all elements, of numbers in one dimension."""
    found, axes, keep = node.numbers(0), node.axes(), node.flag("keepdims", True)
    node.ignore("noop_with_empty_axes")
    if found.array.ndim != 1 or axes == [] or (axes is None and node.flag("noop_with_empty_axes")) or not found.array.size:
        raise NotNumbersError
    result = found.flat[0]
    for item in found.flat[1:]:
        result = _REDUCTIONS[node.operator](result, item)
    return numbers_of([rounded(_wrapped(result, found.dtype), found.dtype)], found.dtype, [1] if keep else [])
