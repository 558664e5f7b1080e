"""The options that change a scheme: what they are called and what they hold, checked in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict

from qcompile.errors import OptionError


class SchemeOptions(TypedDict, total=False):
    """What `QuantScheme.with_options` replaces, and `qcompile.compile` takes; None leaves the scheme as it is."""

    weight_format: str | None
    group_size: int | None
    symmetric: bool | None
    ignore: Sequence[str] | None
    quantize_head: bool | None
    quantize_embedding: bool | None
    head_format: str | None
    matmul: str | None
    activation_group_size: int | None
    activation_symmetric: bool | None
    activation_static: bool | None
    activation_clip: float | None
    cache_keys: str | None
    cache_values: str | None
    cache_sinks: int | None
    cache_window: int | None
    cache_before_positions: bool | None
    cache_bits: float | None


_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "weight_format": (str, "text such as 'int4 g64 sym fp16'"),
    "group_size": (int, "an integer"),
    "symmetric": (bool, "True or False"),
    "ignore": ((list, tuple), "a list of names or 're:' patterns"),
    "quantize_head": (bool, "True or False"),
    "quantize_embedding": (bool, "True or False"),
    "head_format": (str, "text such as 'int8 g32 sym fp16', or 'float'"),
    "matmul": (str, "'exact' or 'fast'"),
    "activation_group_size": (int, "an integer"),
    "activation_symmetric": (bool, "True or False"),
    "activation_static": (bool, "True or False"),
    "activation_clip": ((float, int), "a number above 0 and at most 1"),
    "cache_keys": (str, "text such as 'int4 t32 asym'"),
    "cache_values": (str, "text such as 'int4 g64 asym'"),
    "cache_sinks": (int, "an integer"),
    "cache_window": (int, "an integer"),
    "cache_before_positions": (bool, "True or False"),
    "cache_bits": ((float, int), "bits of a number on average, 0 for the same in every layer"),
}


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None, once all are known and hold what they should.

    Raises:
        OptionError: for a name that does not exist, with those that do, or a value of another kind.
    """
    for name, value in options.items():
        if name not in _KINDS:
            close = get_close_matches(name, _KINDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise OptionError(f"option {name!r}: expected a parameter of the function, or one of {', '.join(_KINDS)}{hint}")
        kind, expected = _KINDS[name]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if value is not None and (wrong or (name == "ignore" and not all(isinstance(item, str) for item in value))):
            raise OptionError(f"{name}={value!r}: expected {expected}")
    return {name: value for name, value in options.items() if value is not None}
