"""Formats of the key/value cache: how vectors are stored, and which tokens stay as they came."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcompile.errors import FormatError
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import VectorForm, VectorFormat, vector_format
from qcompile.quant.vectors.ranked import RankedFormat

Pair = tuple[str, str]
"""Forms of keys and values."""
_KEYS, _VALUES = ("int2 t32 asym", "int4 t32 asym", "int8 t32 sym"), ("int2 g32 asym", "int4 g32 asym", "int8 g64 sym")
MIXED_FORMS: tuple[Pair, ...] = tuple((keys, values) for keys in _KEYS for values in _VALUES)
"""What layers are given where each has its own, the smallest first: KIVI's forms."""


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored; `dtype=None` is the computation dtype.

    With `keys` and `values`, which come together, vectors are packed in these formats. The first `sinks` tokens of a sequence and at least
    the last `window` stay in `dtype`, as do those whose group is not full yet. With `before_positions` keys are kept as they are before
    rotary positions, which are applied on reading (KVQuant, arXiv:2401.18079): their channels are then alike at every position. `layers`
    are the forms of keys and values of the first layers, as text, where not all have the same. With `rematerialized` what keys and values
    are made from is stored in their place, in the form of the keys, where that takes fewer bytes (XQuant, arXiv:2508.10395).
    With `bits` `assign-kv-formats` gives each layer one of `MIXED_FORMS`, so that a number in the pages takes so many on average.
    """

    name: str = "kv"
    dtype: torch.dtype | None = None
    keys: VectorForm | None = None
    values: VectorForm | None = None
    sinks: int = 0
    window: int = 0
    before_positions: bool = False
    layers: tuple[tuple[str, str], ...] = ()
    rematerialized: bool = False
    bits: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no cache holds.

        Raises:
            FormatError: for a negative number of tokens, keys but not values that are ranked, or nothing to rank them by; for ranked
                forms, or ones with tables, in a cache of what keys and values are made from.
        """
        for name in ("sinks", "window"):
            if getattr(self, name) < 0:
                raise FormatError(f"cache_{name}={getattr(self, name)}: expected a number of tokens, 0 for none")
        if self.bits < 0 or (self.bits and (self.before_positions or self.rematerialized or self.is_ranked)):
            raise FormatError(
                f"cache {self.name}: expected cache_bits above 0, and keys and values as they are after positions, got {self.bits:g}; "
                "start from kv-mixed"
            )
        forms = [form for form in (self.keys, self.values, *map(vector_format, itertools.chain(*self.layers))) if form is not None]
        self._require_ranks(forms)
        if self.rematerialized and any(form.tables or isinstance(form, RankedFormat) for form in forms):
            raise FormatError(
                f"cache {self.name}: expected forms without tables, and none that are ranked, for what keys and values are made from, got "
                f"{', '.join(map(str, forms))}; choose int4 g64 asym"
            )

    def _require_ranks(self, forms: Sequence[VectorForm]) -> None:
        ranked = [isinstance(form, RankedFormat) for form in forms]
        if any(ranked) and not (all(ranked) and self.window > 0 and len({form.tokens for form in forms}) == 1):
            raise FormatError(
                f"cache {self.name}: expected keys and values that are both ranked among as many tokens, and a cache_window in which "
                f"attention ranks them, got {', '.join(map(str, forms))} and cache_window={self.window}; start from kv4-zip"
            )

    @property
    def retention(self) -> Retention:
        """Which tokens stay as they came; none has rows for them where every token is stored the same way."""
        own = (vector_format(form) for pair in (*self.layers, *(MIXED_FORMS if self.bits else ())) for form in pair)
        groups = (form.tokens for form in (self.keys, self.values, *own) if form is not None)
        return Retention(self.sinks, self.window, math.lcm(*groups))

    @property
    def is_packed(self) -> bool:
        """Whether vectors are stored as bytes."""
        return self.keys is not None

    @property
    def is_rotated(self) -> bool:
        """Whether queries and keys are rotated against outliers: where integers hold keys as they are after positions."""
        form = self.keys.fine if isinstance(self.keys, RankedFormat) else self.keys
        stored = not self.before_positions and not self.rematerialized
        return isinstance(form, VectorFormat) and form.element.is_integer and stored

    @property
    def is_ranked(self) -> bool:
        """Whether tokens are packed by the attention they have received."""
        return isinstance(self.keys, RankedFormat)

    def forms(self, layer: int = -1) -> tuple[str, ...]:
        """The forms of a layer's keys and values as text; empty where they are stored as numbers."""
        if self.keys is None or self.values is None:
            return ()
        return self.layers[layer] if 0 <= layer < len(self.layers) else (str(self.keys), str(self.values))

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


def _packed(name: str, keys: str, values: str = "", *, sinks: int = 0, window: int = 0, before_positions: bool = False) -> CacheFormat:
    return CacheFormat(name, torch.float16, vector_format(keys), vector_format(values or keys), sinks, window, before_positions)


PLAIN = CacheFormat()
"""In the computation dtype."""
CACHES = {
    "kv": PLAIN,
    "kv16": CacheFormat("kv16", torch.float16),
    "kv8": _packed("kv8", "int8 g64 sym"),
    "kv8-static": _packed("kv8-static", "int8 static"),
    "kvfp8": _packed("kvfp8", "fp8 g64"),
    "kv4": _packed("kv4", "int4 t64 asym", "int4 g64 sym", sinks=4, window=28),
    "kv4-token": _packed("kv4-token", "int4 g64 sym", sinks=4, window=56),
    "kv4-kivi": _packed("kv4-kivi", "int4 t32 asym", "int4 g32 asym", sinks=4, window=32),
    "kv4-xquant": replace(_packed("kv4-xquant", "int4 g64 asym", sinks=4), rematerialized=True),
    "kv4-zip": _packed("kv4-zip", "int4 g64 asym over int3 g64 asym top 16 of 32", sinks=4, window=32),
    "kv-mixed": replace(_packed("kv-mixed", "int4 t32 asym", "int4 g32 asym", sinks=4, window=32), bits=4.0),
    "kv2": _packed("kv2", "klt2", sinks=4, window=116, before_positions=True),
    "kv2-kivi": _packed("kv2-kivi", "int2 t32 asym", "int2 g32 asym", sinks=4, window=32),
    "kv4-block": _packed("kv4-block", "bfp4 g16 sorted", sinks=4, window=28),
    "kv4-kvquant": _packed("kv4-kvquant", "nuq4 static s1", "nuq4 token s1", sinks=4, before_positions=True),
    "kv3-kvquant": _packed("kv3-kvquant", "nuq3 static s1", "nuq3 token s1", sinks=4, before_positions=True),
    "kv3-pca": _packed("kv3-pca", "pca3/4 int4 g16 sym", sinks=4, window=32, before_positions=True),
    "kv2-gear": _packed("kv2-gear", "gear64 r2 s1 int2 t32 asym", "gear64 r2 s1 int2 g32 asym", sinks=4, window=32),
    "kv-qjl": _packed("kv-qjl", "qjl256", "int4 g64 asym", sinks=4, window=32),
}
"""Presets by name: KIVI is arXiv:2402.02750, XQuant arXiv:2508.10395, ZipCache arXiv:2405.14256; others are named by their forms' files."""
