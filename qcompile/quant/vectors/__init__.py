"""Further forms of cached vectors: each file holds one, with its paper, its bytes and how its tables are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qcompile.quant.vector_format import VectorForm
from qcompile.quant.vectors.static import read_static

FAMILIES: Mapping[str, Callable[[str], VectorForm | None]] = MappingProxyType({"int8 static": read_static})
"""An example of each family's text -> what reads it, giving None for any other."""
