"""Frozen dataclasses to JSON and back, checked against their annotations: what a file claims is never trusted to have the right type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

from qcompile.errors import ArtifactError
from qcompile.ir.size import Size, from_json

T = TypeVar("T")


def encode(value: Any) -> Any:
    """JSON of dataclasses, tuples, dicts and plain values; a tuple becomes a list."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(kind: type[T], data: Any, where: str) -> T:
    """Invert `encode` for a value of type `kind`: a dataclass, tuple, dict or plain type.

    Args:
        kind: the type, with annotations made of dataclasses, tuples, dicts, unions, `Size`, `Any` and plain types.
        data: parsed JSON.
        where: what to call the place in an error.

    Raises:
        ArtifactError: naming the place in the file, what was expected there and what came.
    """
    try:
        return cast(T, _decode(kind, data, where))
    except RecursionError as error:
        raise ArtifactError(f"{where}: expected values nested a few times, got hundreds of levels; do not run this artifact") from error


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return thaw(data)
    if kind == Size:
        return _size(data, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    origin = typing.get_origin(kind)
    readers: dict[Any, Callable[[Any, Any, str], Any]] = {tuple: _tuple, dict: _dict, types.UnionType: _union, typing.Union: _union}
    if origin in readers:
        return readers[origin](kind, data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    plain = type(None) if kind is None else kind
    if not isinstance(data, plain) or (isinstance(data, bool) and plain is not bool):
        raise _mismatch(where, getattr(plain, "__name__", str(plain)), data)
    return data


def thaw(value: Any) -> Any:
    """A JSON value of no declared type, in which `{"size": …}` holds an expression again."""
    if isinstance(value, list):
        return [thaw(item) for item in value]
    if isinstance(value, dict):
        return {key: from_json(item) if key == "size" else thaw(item) for key, item in value.items()}
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _mismatch(where, f"an object ({kind.__name__})", data)
    hints = _hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ArtifactError(
            f"{where}: expected the keys {', '.join(fields)}, got {unknown[0]!r}; the artifact was written by another "
            "version or altered: compile again"
        )
    required = [
        name for name, item in fields.items() if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise ArtifactError(f"{where}: expected the key {missing[0]!r} ({kind.__name__}), got {', '.join(data) or 'none'}; compile again")
    return kind(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _tuple(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, list):
        raise _mismatch(where, "a list", data)
    arguments = typing.get_args(kind)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if len(arguments) != len(data):
        raise _mismatch(where, f"{len(arguments)} items", data)
    # Pairs are options of hashable specifications: a list inside one is a tuple.
    return tuple(
        _frozen(item) if part is Any else _decode(part, item, f"{where}[{index}]")
        for index, (part, item) in enumerate(zip(arguments, data, strict=True))
    )


def _dict(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _mismatch(where, "an object", data)
    part = typing.get_args(kind)[1]
    return {key: _decode(part, item, f"{where}.{key}") for key, item in data.items()}


def _union(kind: Any, data: Any, where: str) -> Any:
    for part in typing.get_args(kind):
        try:
            return _decode(part, data, where)
        except ArtifactError:
            continue
    raise _mismatch(where, str(kind), data)


def _size(data: Any, where: str) -> Any:
    if isinstance(data, list) and len(data) == 3 and isinstance(data[0], str):
        return (data[0], _size(data[1], where), _size(data[2], where))
    if isinstance(data, bool) or not isinstance(data, int | str):
        raise _mismatch(where, "a size (an integer, a name, or [operator, left, right])", data)
    return data


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _mismatch(where: str, expected: str, data: Any) -> ArtifactError:
    return ArtifactError(
        f"{where}: expected {expected}, got {type(data).__name__} {str(data)[:60]!r}; the file was altered or written "
        "by another version: compile again"
    )
