"""Which packed forms kernels read, and how: the one place that tells them apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from qcompile.codegen.triton.block_vectors import BlockVectors, block_keys, block_values, refuses_block
from qcompile.codegen.triton.cache_tiles import KeyTile, ValueTile
from qcompile.codegen.triton.packed_vectors import PackedVectors, packed_keys, packed_values, refuses_vectors
from qcompile.errors import FormatError
from qcompile.ir.lowered import KernelSpec, item_operand
from qcompile.quant.vector_format import VectorForm, VectorFormat, vector_format
from qcompile.quant.vectors.block import BlockFormat

PackedForm = PackedVectors | BlockVectors
PACKED = ("uint8",)
"""How pages and tables are stored."""
KEY_ORDER, VALUE_ORDER = item_operand("k_tables", 0), item_operand("v_tables", 0)
"""The tables that kernels take: the order of channels."""
TABLES = (KEY_ORDER, VALUE_ORDER)


def packed_form(text: str, size: int) -> PackedForm:
    """How vectors of `size` numbers in the form called `text` are read, which `refuses_packed` does not refuse."""
    form = vector_format(text)
    if isinstance(form, BlockFormat):
        return BlockVectors(form, size)
    assert isinstance(form, VectorFormat)
    return PackedVectors(form, size)


def refuses_packed(text: object, size: int) -> str | None:
    """Why kernels do not read vectors of `size` numbers in this form, or None."""
    try:
        form = vector_format(str(text))
        form.width(size)
    except FormatError as error:
        return str(error)
    if isinstance(form, BlockFormat):
        reason = refuses_block(form, size)
    elif isinstance(form, VectorFormat):
        reason = refuses_vectors(form, size)
    else:
        reason = "expected a form whose scales or powers stand beside its codes"
    return reason and f"{text}: {reason}"


class HasForm(Protocol):
    """Vectors in a form."""

    @property
    def form(self) -> VectorForm:
        """What they are packed in."""


def refuses_tables(spec: KernelSpec, tables: Iterable[tuple[str, HasForm]]) -> str | None:
    """An operand with an order of channels for vectors whose form has none, or none for such as have one."""
    for name, vectors in tables:
        wanted = bool(vectors.form.tables)
        if wanted != (spec.format(name) is not None):
            return f"{vectors.form}: expected {'the table' if wanted else 'no table'} {name}, got {'none' if wanted else 'one'}"
    return None


def key_tile(vectors: PackedForm, kind: str) -> KeyTile:
    """Packed keys, for queries of the 16-bit type `kind`."""
    return block_keys(vectors, kind, KEY_ORDER) if isinstance(vectors, BlockVectors) else packed_keys(vectors, kind)


def value_tile(vectors: PackedForm, kind: str) -> ValueTile:
    """Packed values, where weights are rounded to the 16-bit type `kind`."""
    return block_values(vectors, kind, VALUE_ORDER) if isinstance(vectors, BlockVectors) else packed_values(vectors, kind)
