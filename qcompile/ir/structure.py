"""Nested containers of tensors as a template: how a model's arguments and results are flattened and put together again.

A template is JSON: {"leaf": i}, {"tuple": [...]}, {"list": [...]}, {"dict": {...}}, {"value": constant} or null.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qcompile.errors import QCompileError

Template = dict[str, Any] | None


def template_of(tree: Any) -> tuple[Template, list[Any]]:
    """The template of `tree` and its leaves (tensors) in order; mappings of any class become plain dicts."""
    leaves: list[Any] = []

    def walk(value: Any) -> Template:
        if value is None:
            return None
        if isinstance(value, dict):
            return {"dict": {str(key): walk(item) for key, item in value.items()}}
        if isinstance(value, tuple | list):
            return {"tuple" if isinstance(value, tuple) else "list": [walk(item) for item in value]}
        if isinstance(value, bool | int | float | str):
            return {"value": value}
        leaves.append(value)
        return {"leaf": len(leaves) - 1}

    return walk(tree), leaves


def unflatten(template: Template, leaves: list[Tensor]) -> Any:
    """Put leaves back into the containers of `template`."""
    if template is None:
        return None
    kind, content = next(iter(template.items()))
    if kind == "leaf":
        return leaves[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: unflatten(item, leaves) for key, item in content.items()}
    items = [unflatten(item, leaves) for item in content]
    return tuple(items) if kind == "tuple" else items


def flatten(template: Template, tree: Any, where: str = "input") -> list[Tensor]:
    """The leaves of `tree` in the order of `template`.

    Raises:
        QCompileError: where `tree` differs from the template, naming the place.
    """
    found: dict[int, Tensor] = {}
    _collect(template, tree, where, found)
    return [found[index] for index in sorted(found)]


def _collect(template: Template, tree: Any, where: str, found: dict[int, Tensor]) -> None:
    kind: str
    content: Any
    kind, content = next(iter(template.items())) if template is not None else ("none", None)
    if kind in ("dict", "tuple", "list"):
        for key, item in _children(kind, content, tree, where):
            _collect(item, tree[key], f"{where}.{key}" if kind == "dict" else f"{where}[{key}]", found)
    elif kind == "leaf":
        if not isinstance(tree, Tensor):
            raise QCompileError(f"{where}: expected a tensor, got {type(tree).__name__}")
        found[content] = tree
    elif kind == "none" and tree is not None:
        raise QCompileError(f"{where}: expected None (as when the model was traced), got {type(tree).__name__}")
    elif kind == "value" and tree != content:
        raise QCompileError(f"{where}: expected {content!r} (fixed when the model was traced), got {tree!r}; compile again with that value")


def _children(kind: str, content: Any, tree: Any, where: str) -> list[tuple[Any, Template]]:
    """The entries of a container and where they stand in `tree`, which must have the same ones."""
    if kind == "dict":
        if not isinstance(tree, dict) or set(tree) != set(content):
            got = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise QCompileError(f"{where}: expected the keys {sorted(content)}, got {got}")
        return list(content.items())
    if not isinstance(tree, tuple | list) or len(tree) != len(content):
        got = f"{len(tree)} values" if isinstance(tree, tuple | list) else type(tree).__name__
        raise QCompileError(f"{where}: expected {len(content)} values, got {got}")
    return list(enumerate(content))
