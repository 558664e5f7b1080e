"""weights.safetensors, read by memory map: each 16 MiB chunk is checked before its first use."""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ArtifactError
from qcompile.ir.tensor_file import DTYPES

CHUNK_BYTES = 16 << 20
"""Large enough that hashing runs at full speed, small enough that reading one tensor of a large model checks little else."""
MAX_HEADER_BYTES = 100 << 20
"""The limit that safetensors itself sets."""


def chunk_hashes(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """SHA-256 of each `chunk_bytes` of a file, in order."""
    with path.open("rb") as file:
        return [hashlib.sha256(chunk).hexdigest() for chunk in iter(lambda: file.read(chunk_bytes), b"")]


@dataclass
class WeightsFile:
    """A mapped safetensors file. `tensor` verifies every chunk that a tensor touches when it is first read.

    Attributes:
        path: the file.
        hashes: SHA-256 of each chunk of `chunk_bytes`.
    """

    path: Path
    hashes: Sequence[str]
    chunk_bytes: int = CHUNK_BYTES
    _verified: set[int] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        """Map the file and read its header.

        Raises:
            ArtifactError: if the header is damaged or points outside the file.
        """
        if self.path.stat().st_size < 8:
            raise ArtifactError(
                f"{self.path}: expected a safetensors header, got {self.path.stat().st_size} bytes; copy the artifact again"
            )
        with self.path.open("rb") as file:
            # Copy-on-write: torch wants writable memory, and nothing written there reaches the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._verify(0, 8)
        (length,) = struct.unpack("<Q", self._map[:8])
        self._start = 8 + length
        if length > MAX_HEADER_BYTES or self._start > len(self._map):
            raise ArtifactError(
                f"{self.path}: expected a header inside the file of {len(self._map)} bytes, got one of {length}; copy the artifact again"
            )
        self._verify(8, self._start)
        self.header = self._read_header()

    def _read_header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
        try:
            parsed = json.loads(self._map[8 : self._start])
            return {name: self._entry(item) for name, item in parsed.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{self.path}: expected a safetensors header, got {type(error).__name__}: {error}; copy the artifact again"
            ) from error

    def _entry(self, item: Mapping[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        dtype, shape = DTYPES[item["dtype"]], tuple(int(size) for size in item["shape"])
        begin, end = (self._start + int(offset) for offset in item["data_offsets"])
        inside = self._start <= begin <= end <= len(self._map) and min(shape, default=0) >= 0
        if not inside or end - begin != prod(shape) * dtype.itemsize or begin % dtype.itemsize:
            raise ValueError(f"{item} does not lie inside the file")
        return dtype, shape, begin, end

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, over the mapped memory: not a copy.

        Raises:
            ArtifactError: if a chunk that it touches is damaged.
        """
        dtype, shape, begin, end = self.header[name]
        self._verify(begin, end)
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=begin).view(shape)

    def verify_all(self, threads: int = 1) -> None:
        """Verify every chunk now, by so many threads.

        Raises:
            ArtifactError: naming the first damaged chunk.
        """
        if threads == 1:
            self._verify(0, len(self._map))
            return
        firsts = range(0, len(self._map), self.chunk_bytes)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: self._verify(first, first + 1), firsts))

    def release(self, name: str) -> None:
        """Let the system have the memory back that holds the tensor called `name`; who reads it again gets it from the file."""
        _, _, begin, end = self.header[name]
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _verify(self, begin: int, end: int) -> None:
        for index in range(begin // self.chunk_bytes, -(-end // self.chunk_bytes)):
            if index in self._verified:
                continue
            first = index * self.chunk_bytes
            chunk = memoryview(self._map)[first : first + self.chunk_bytes]
            if index >= len(self.hashes) or hashlib.sha256(chunk).hexdigest() != self.hashes[index]:
                raise ArtifactError(
                    f"{self.path}: damaged: bytes {first} to {first + len(chunk)} do not have the SHA-256 that the manifest gives; "
                    "copy the artifact again"
                )
            self._verified.add(index)


@dataclass(frozen=True)
class ArtifactSource:
    """A constant inside an artifact's weights.safetensors."""

    file: WeightsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.file.header[self.name][1]

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.file.header[self.name][0]

    @property
    def key(self) -> str:
        """The artifact's weights and the name."""
        return f"artifact:{self.file.path.parent.name}:{self.name}"

    def load(self) -> Tensor:
        """The tensor over the mapped file; verified when first read."""
        return self.file.tensor(self.name)

    def release(self) -> None:
        """Let the memory of the tensor go; it is read from the file again if need be."""
        self.file.release(self.name)
