"""Integer expressions over named sizes (batch, sequence, capacity), as nested tuples: stored as JSON, evaluated without sympy.

An expression is an int, a name, or `(operator, left, right)` with an operator of `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcompile.errors import ArtifactError

Size = int | str | tuple[Any, ...]

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "ceildiv": lambda a, b: -(-a // b),
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
}


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """The value of `size` where every name has its value in `sizes`.

    Raises:
        ArtifactError: for an unknown name or operator.
    """
    if isinstance(size, bool):
        raise ArtifactError(f"size expression: expected an integer, got {size}")
    if isinstance(size, int):
        return size
    if isinstance(size, str):
        if size not in sizes:
            raise ArtifactError(f"size expression: unknown name {size!r}; expected one of {', '.join(sizes)}")
        return sizes[size]
    if len(size) != 3 or size[0] not in OPERATORS:
        raise ArtifactError(f"size expression {size!r}: expected (operator, left, right) with one of {', '.join(OPERATORS)}")
    return OPERATORS[size[0]](evaluate(size[1], sizes), evaluate(size[2], sizes))


def names_in(size: Size) -> set[str]:
    """The names that an expression is made of."""
    if isinstance(size, tuple):
        return names_in(size[1]) | names_in(size[2])
    return {size} if isinstance(size, str) else set()


def from_json(value: Any) -> Size:
    """Read back what JSON made of an expression: lists become tuples."""
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


def text(size: Size) -> str:
    """The expression as a person writes it: `B·S`, `ceildiv(S, 64)`."""
    if not isinstance(size, tuple):
        return str(size)
    operator, left, right = size
    infix = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}.get(operator)
    return f"({text(left)}{infix}{text(right)})" if infix else f"{operator}({text(left)}, {text(right)})"
