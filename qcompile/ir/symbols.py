"""From the tracer's symbolic sizes to size expressions that are stored and evaluated without sympy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from qcompile.errors import VerifyError
from qcompile.ir.size import Size

_FUNCTIONS = {"FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod", "PythonMod": "mod", "Max": "max", "Min": "min"}


def size_expression(value: int | torch.SymInt, names: Mapping[str, str]) -> Size:
    """The expression of a symbolic size over the names that `names` gives to symbols.

    Raises:
        VerifyError: for arithmetic that has no counterpart, naming it.
    """
    if isinstance(value, int):
        return value
    return _convert(value.node.expr, names)


def _convert(expression: Any, names: Mapping[str, str]) -> Size:
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return names.get(str(expression), str(expression))
    kind = type(expression).__name__
    operator = {"Add": "add", "Mul": "mul"}.get(kind) or _FUNCTIONS.get(kind)
    if operator is None:
        raise VerifyError(f"size {expression}: expected sums, products, floor divisions, remainders, minima and maxima, got {kind}")
    return reduce(lambda left, right: (operator, left, right), [_convert(item, names) for item in expression.args])
