"""Frozen dataclasses to JSON and back, checked against their annotations: what a file claims is never trusted to have the right type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
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
        return cast(T, _reader(cast(Hashable, kind))(data))
    except _WrongValueError as error:
        raise ArtifactError(f"{where}{''.join(reversed(error.way))}: {error}") from error
    except RecursionError as error:
        raise ArtifactError(f"{where}: expected values nested a few times, got hundreds of levels; do not run this artifact") from error


class _WrongValueError(Exception):
    """A value that does not fit: what was expected and came, and in `way` the steps to its place, the last one first."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.way: list[str] = []


_Reader = Callable[[Any], Any]


@cache
def _reader(kind: Any) -> _Reader:
    """What reads values of a type; made once, since a plan has tens of thousands of them."""
    if kind is Any:
        return thaw
    if kind == Size:
        return _size
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    makers: dict[Any, Callable[[Any], _Reader]] = {tuple: _tuple, dict: _dict, types.UnionType: _union, typing.Union: _union}
    make = makers.get(typing.get_origin(kind), _plain)
    return make(kind)


def _plain(kind: Any) -> _Reader:
    plain = type(None) if kind is None else kind

    def read(data: Any) -> Any:
        if type(data) is plain:
            return data
        if plain is float and type(data) is int:
            return float(data)
        if not isinstance(data, plain) or isinstance(data, bool):
            raise _mismatch(getattr(plain, "__name__", str(plain)), data)
        return data

    return read


def thaw(value: Any) -> Any:
    """A JSON value of no declared type, in which `{"size": …}` holds an expression again."""
    if isinstance(value, list):
        return [thaw(item) for item in value]
    if isinstance(value, dict):
        return {key: from_json(item) if key == "size" else thaw(item) for key, item in value.items()}
    return value


@cache
def _fields(kind: Any) -> tuple[dict[str, _Reader], frozenset[str]]:
    """The readers of a dataclass's fields, and the names of those that have no default."""
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    missing = dataclasses.MISSING
    required = (item.name for item in fields if item.default is missing and item.default_factory is missing)
    return {item.name: _reader(hints[item.name]) for item in fields}, frozenset(required)


def _dataclass(kind: Any) -> _Reader:
    def read(data: Any) -> Any:
        if not isinstance(data, dict):
            raise _mismatch(f"an object ({kind.__name__})", data)
        readers, required = _fields(kind)
        _require_keys(kind, data, readers, required)
        name, values = "", {}
        try:
            for name, value in data.items():
                values[name] = readers[name](value)
        except _WrongValueError as error:
            error.way.append(f".{name}")
            raise
        return kind(**values)

    return read


def _require_keys(kind: Any, data: dict[str, Any], known: Mapping[str, _Reader], required: frozenset[str]) -> None:
    if not data.keys() <= known.keys():
        unknown = min(set(data) - set(known))
        raise _WrongValueError(
            f"expected the keys {', '.join(known)}, got {unknown!r}; the artifact was written by another version or altered: compile again"
        )
    if not required <= data.keys():
        missing = next(name for name in known if name in required and name not in data)
        raise _WrongValueError(f"expected the key {missing!r} ({kind.__name__}), got {', '.join(data) or 'none'}; compile again")


def _tuple(kind: Any) -> _Reader:
    arguments = typing.get_args(kind)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _items(_reader(arguments[0]))
    # Pairs are options of hashable specifications: a list inside one is a tuple.
    readers = [_frozen if part is Any else _reader(part) for part in arguments]

    def read(data: Any) -> Any:
        if not isinstance(data, list):
            raise _mismatch("a list", data)
        if len(readers) != len(data):
            raise _mismatch(f"{len(readers)} items", data)
        return _listed(one(item) for one, item in zip(readers, data, strict=True))

    return read


def _items(one: _Reader) -> _Reader:
    """Any number of values of one type."""

    def read(data: Any) -> Any:
        if not isinstance(data, list):
            raise _mismatch("a list", data)
        return _listed(map(one, data))

    return read


def _listed(values: Iterable[Any]) -> tuple[Any, ...]:
    """Values, read one after the other: one that does not fit is told its place."""
    made: list[Any] = []
    try:
        made.extend(values)
    except _WrongValueError as error:
        error.way.append(f"[{len(made)}]")
        raise
    return tuple(made)


def _dict(kind: Any) -> _Reader:
    one = _reader(typing.get_args(kind)[1])

    def read(data: Any) -> Any:
        if not isinstance(data, dict):
            raise _mismatch("an object", data)
        key, made = "", {}
        try:
            for key, item in data.items():
                made[key] = one(item)
        except _WrongValueError as error:
            error.way.append(f".{key}")
            raise
        return made

    return read


def _union(kind: Any) -> _Reader:
    readers = [_reader(part) for part in typing.get_args(kind)]

    def read(data: Any) -> Any:
        for one in readers:
            try:
                return one(data)
            except _WrongValueError:
                continue
        raise _mismatch(str(kind), data)

    return read


def _size(data: Any) -> Any:
    if isinstance(data, list) and len(data) == 3 and isinstance(data[0], str):
        return (data[0], _size(data[1]), _size(data[2]))
    if isinstance(data, bool) or not isinstance(data, int | str):
        raise _mismatch("a size (an integer, a name, or [operator, left, right])", data)
    return data


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _mismatch(expected: str, data: Any) -> _WrongValueError:
    return _WrongValueError(
        f"expected {expected}, got {type(data).__name__} {str(data)[:60]!r}; the file was altered or written by another version: "
        "compile again"
    )
