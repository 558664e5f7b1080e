"""Under which names kernels know the arguments of a call: those of the operator's schema, with a few of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

_FIRST_IS_X = {"self": "x", "input": "x", "other": "y"}
RENAMED: dict[str, dict[str, str]] = {"aten.argmax.default": {"self": "logits"}, "aten.topk.default": {"self": "logits"}}
"""Operator -> schema argument -> operand name, where that is neither its own name nor x (self, input) or y (other)."""


def bind_arguments(name: str, operator: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Operand name -> argument of a call of the operator stored as `name`; arguments left to their default are absent."""
    given = dict(zip(_argument_names(operator), args, strict=False)) | dict(kwargs)
    renamed: dict[str, str] = RENAMED.get(name, _FIRST_IS_X)
    return {renamed.get(key, key): value for key, value in given.items()}


@cache
def _argument_names(operator: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(argument.name for argument in operator._schema.arguments)  # type: ignore[attr-defined]


def output_name(index: int) -> str:
    """The operand name of result `index`: out, out1, out2 …."""
    return f"out{index}" if index else "out"
