"""Further forms of cached vectors: each file holds one, with its paper, its bytes and how its tables are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qcompile.quant.vector_format import VectorForm
from qcompile.quant.vectors.block import read_block
from qcompile.quant.vectors.gear import read_gear
from qcompile.quant.vectors.klt import read_klt
from qcompile.quant.vectors.kvquant import read_nuq
from qcompile.quant.vectors.pca import read_pca
from qcompile.quant.vectors.qjl import read_qjl
from qcompile.quant.vectors.ranked import read_ranked
from qcompile.quant.vectors.static import read_static

FAMILIES: Mapping[str, Callable[[str], VectorForm | None]] = MappingProxyType(
    {
        "int8 static": read_static,
        "bfp4 g16 sorted": read_block,
        "pca3/4 int4 g16 sym": read_pca,
        "gear64 r2 s1 int2 t32 asym": read_gear,
        "qjl256": read_qjl,
        "nuq3 static s1": read_nuq,
        "klt2": read_klt,
        "int4 g64 asym over int2 g64 asym top 16 of 32": read_ranked,
    }
)
"""An example of each family's text -> what reads it, giving None for any other."""
