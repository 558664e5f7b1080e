"""Formats of the key/value cache: how vectors are stored, and which tokens stay as they came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcompile.errors import FormatError
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import VectorFormat, vector_format


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored; `dtype=None` is the computation dtype.

    With `keys` and `values`, which come together, vectors are packed in these formats. The first `sinks` tokens of a sequence and at least
    the last `window` stay in `dtype`, as do those whose group is not full yet.
    """

    name: str = "kv"
    dtype: torch.dtype | None = None
    keys: VectorFormat | None = None
    values: VectorFormat | None = None
    sinks: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        """Refuse what no cache holds.

        Raises:
            FormatError: for a negative number of tokens.
        """
        for name in ("sinks", "window"):
            if getattr(self, name) < 0:
                raise FormatError(f"cache_{name}={getattr(self, name)}: expected a number of tokens, 0 for none")

    @property
    def retention(self) -> Retention:
        """Which tokens stay as they came; none has rows for them where every token is stored the same way."""
        groups = (form.tokens for form in (self.keys, self.values) if form is not None)
        return Retention(self.sinks, self.window, math.lcm(*groups))

    @property
    def is_packed(self) -> bool:
        """Whether vectors are stored as bytes."""
        return self.keys is not None

    @property
    def forms(self) -> tuple[str, ...]:
        """The formats of keys and values as text; empty where they are stored as numbers."""
        return () if self.keys is None or self.values is None else (str(self.keys), str(self.values))

    def with_options(self, given: Mapping[str, Any]) -> CacheFormat:
        """A copy with the `cache_` options among `given`, which hold what they should (`quant/scheme_options.py`).

        Raises:
            FormatError: for one given to a cache that is not packed, or text that is no format.
        """
        mine = {name.removeprefix("cache_"): value for name, value in given.items() if name.startswith("cache_")}
        if mine and not self.is_packed:
            wanted = ", ".join(f"cache_{name}" for name in mine)
            raise FormatError(f"cache {self.name}: expected a packed one for {wanted}; choose a target that ends in kv8 or kv4")
        changes: dict[str, Any] = {name: vector_format(value) if isinstance(value, str) else value for name, value in mine.items()}
        return replace(self, **changes)


def _packed(name: str, keys: str, values: str = "", *, sinks: int = 0, window: int = 0) -> CacheFormat:
    return CacheFormat(name, torch.float16, vector_format(keys), vector_format(values or keys), sinks, window)


PLAIN = CacheFormat()
"""In the computation dtype."""
CACHES = {
    "kv": PLAIN,
    "kv16": CacheFormat("kv16", torch.float16),
    "kv8": _packed("kv8", "int8 g64 sym"),
    "kvfp8": _packed("kvfp8", "fp8 g64"),
    "kv4": _packed("kv4", "int4 g64 asym"),
    "kv4-token": _packed("kv4-token", "int4 g64 asym"),
    "kv4-kivi": _packed("kv4-kivi", "int4 t32 asym", "int4 g32 asym", sinks=4, window=32),
    "kv2-kivi": _packed("kv2-kivi", "int2 t32 asym", "int2 g32 asym", sinks=4, window=32),
}
"""Presets by name: KIVI is arXiv:2402.02750."""
