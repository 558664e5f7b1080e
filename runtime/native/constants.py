"""The constants that native steps read, in the layouts of their kernels: packed by the library itself into one memory of huge pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.constants import Constant
from qcompile.ir.layouts import TILE, WORDS, apply_layout
from qcompile.runtime.huge_pages import huge_zeros
from qcompile.runtime.native.library import PACKING_WORDS, Library
from qcompile.runtime.weights import ArtifactSource

Packed = dict[tuple[str, str], Tensor]
"""Constants by name and layout ("" is as they are stored)."""
AT_ONCE_BYTES = 64 << 20
"""What is read before it is packed: where constants are computed as they are read, no more than this stands beside what is packed."""


def packed_constants(library: Library, constants: Mapping[str, Constant], wanted: Iterable[tuple[str, str]], threads: int) -> Packed:
    """Every wanted constant in its layout, in the order in which they are wanted.

    What is wanted as it is stored is used where it lies, in the mapped file of an artifact. Of what is packed the stored form is let go, so
    that it does not stand beside the packed one.
    """
    items = list(wanted)
    verify((constants[name].source for name, _ in items), threads)
    places = {item: place for item in items if (place := _place(constants[item[0]], item[1])) is not None}
    packed: Packed = dict(zip(places, huge_zeros((place.shape, place.dtype) for place in places.values()), strict=True))
    for batch in _batches(items, constants):
        stored = {name: constants[name].materialize().contiguous() for name, _ in batch}
        rows = []
        for name, layout in batch:
            place = places.get((name, layout))
            if place is None:
                packed[name, layout] = apply_layout(layout, stored[name]) if layout else stored[name]
                continue
            rows.append([stored[name].data_ptr(), packed[name, layout].data_ptr(), *place.packing])
        library.pack(torch.tensor(rows, dtype=torch.int64).view(-1, PACKING_WORDS), threads)
        _release(constants[name] for name, layout in batch if layout)
    return packed


def verify(sources: Iterable[object], threads: int) -> None:
    """Check the files that constants are read from at once, by several threads."""
    for file in {source.file.path: source.file for source in sources if isinstance(source, ArtifactSource)}.values():
        file.verify_all(threads)


@dataclass(frozen=True)
class _Place:
    """What a packed constant is, and what the library is told of it: rows, bytes of a row, bytes of a word, mask and bits."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: tuple[int, ...]


def _place(constant: Constant, layout: str) -> _Place | None:
    """Where the library makes the layout; None where torch does, or nothing is to be made."""
    words = WORDS.get(layout)
    if words is None or len(constant.shape) != 2:
        return None
    rows, columns = constant.shape
    size = words.size or constant.dtype.itemsize
    row_bytes = columns * constant.dtype.itemsize
    shape = (-(-rows // TILE), -(-row_bytes // size), TILE)
    return _Place(shape, torch.int32 if words.size else constant.dtype, (rows, row_bytes, size, words.mask, words.bits))


def _batches(items: Iterable[tuple[str, str]], constants: Mapping[str, Constant]) -> Iterator[list[tuple[str, str]]]:
    batch, size = list[tuple[str, str]](), 0
    for item in items:
        batch.append(item)
        size += constants[item[0]].nbytes
        if size >= AT_ONCE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _release(constants: Iterable[Constant]) -> None:
    for constant in constants:
        if isinstance(constant.source, ArtifactSource):
            constant.source.release()
