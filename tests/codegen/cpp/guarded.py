"""Copies of tensors in memory where nothing beside them can be touched unnoticed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

PLACES = ("behind a guard", "before a guard")
PAGE = mmap.PAGESIZE


@dataclass
class _Room:
    """Pages for `size` bytes between two that nothing may touch; the rest of the pages is poisoned for instrumented code.

    The copy lies right behind the first guard or right before the second. A guard stops every access, masked vectors included;
    poison is exact behind a copy, and in front of it to 8 bytes.
    """

    size: int
    place: str

    def __post_init__(self) -> None:
        end = PAGE + -(-self.size // PAGE) * PAGE
        self.memory = mmap.mmap(-1, end + PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._process = ctypes.CDLL(None)
        for guard in (0, end):
            self._protect(guard, 0)
        self.offset = PAGE if self.place == PLACES[0] else end - self.size
        rest = (self.offset + self.size, end) if self.place == PLACES[0] else (PAGE, self.offset)
        self._region = ctypes.c_void_p(self.address + rest[0]), ctypes.c_size_t(rest[1] - rest[0])
        self._process["__asan_poison_memory_region"](*self._region)

    def _protect(self, offset: int, mode: int) -> None:
        if self._process.mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(PAGE), mode):
            raise OSError(f"mprotect at {offset}: refused")

    def close(self) -> None:
        """Forget the poison: the next owner of these addresses may touch them."""
        self._process["__asan_unpoison_memory_region"](*self._region)


def _reach(tensor: Tensor) -> Tensor:
    """Everything from the first to the last element of a view, as one axis."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((count,), (1,), tensor.storage_offset())


@contextmanager
def guarded(tensors: Mapping[str, Tensor], place: str, *, write_back: bool) -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors at a place of `PLACES`, as they are strided; with `write_back`, what changes there changes the tensors.

    Needs a process with AddressSanitizer.
    """
    rooms, copies = [], {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            copies[name] = tensor
            continue
        there = _reach(tensor)
        room = _Room(there.numel() * tensor.element_size(), place)
        flat = torch.frombuffer(room.memory, dtype=tensor.dtype, count=there.numel(), offset=room.offset)
        flat.copy_(there)
        copies[name] = flat.as_strided(tensor.shape, tensor.stride(), 0)
        rooms.append(room)
    try:
        yield copies
        for name, tensor in tensors.items():
            if write_back and tensor.numel() and not torch.equal(copies[name], tensor):
                _reach(tensor).copy_(_reach(copies[name]))
    finally:
        for room in rooms:
            room.close()
