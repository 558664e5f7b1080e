"""weights.safetensors: written one tensor at a time; read by memory map, each 16 MiB chunk checked before its first use."""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ArtifactError
from qcompile.ir.constants import Constant, RoundedSource

CHUNK_BYTES = 16 << 20
"""Large enough that hashing runs at full speed, small enough that reading one tensor of a large model checks little else."""
MAX_HEADER_BYTES = 100 << 20
"""The limit that safetensors itself sets."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_weights(path: Path, constants: Mapping[str, Constant]) -> None:
    """Write every constant; they are materialised one at a time, the parts of one rounding one after the other.

    Wider elements come first in the file, so that each tensor is aligned to its own element size and can be used where it lies.

    Raises:
        ArtifactError: for a dtype that safetensors has no name for.
    """
    header, text, size = weights_header(constants)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + size)
        for name in _writing_order(constants):
            file.seek(start + header[name]["data_offsets"][0])
            file.write(_bytes(constants[name], name))


def weights_bytes(constants: Mapping[str, Constant]) -> int:
    """Bytes of the file that `write_weights` makes of these constants, none of which is read."""
    _, text, size = weights_header(constants)
    return 8 + len(text) + size


def weights_header(constants: Mapping[str, Constant]) -> tuple[dict[str, Any], bytes, int]:
    """Name -> dtype, shape and place; the same as padded JSON; and the bytes of all tensors.

    Raises:
        ArtifactError: for a dtype that safetensors has no name for.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(constants, key=lambda item: (-constants[item].dtype.itemsize, item)):
        constant = constants[name]
        if constant.dtype not in _NAMES:
            raise ArtifactError(f"constant {name}: expected a dtype that safetensors can hold, got {constant.dtype}; convert it first")
        header[name] = {"dtype": _NAMES[constant.dtype], "shape": list(constant.shape), "data_offsets": [offset, offset + constant.nbytes]}
        offset += constant.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return header, text + b" " * (-(len(text) + 8) % 64), offset


def _writing_order(constants: Mapping[str, Constant]) -> list[str]:
    """Codes, scale and zero point of one rounding next to each other, so that its result is freed before the next is made."""
    first: dict[int, int] = {}
    keys = {}
    for index, (name, constant) in enumerate(constants.items()):
        source = constant.source
        key = id(source.rounding) if isinstance(source, RoundedSource) else id(constant)
        keys[name] = first.setdefault(key, index)
    return sorted(constants, key=lambda name: keys[name])


def _bytes(constant: Constant, name: str) -> memoryview:
    tensor = constant.materialize().contiguous()
    if tuple(tensor.shape) != constant.shape or tensor.dtype != constant.dtype:
        raise ArtifactError(
            f"constant {name}: expected {constant.dtype} {constant.shape} as its log says, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
        dtype, shape = _DTYPES[item["dtype"]], tuple(int(size) for size in item["shape"])
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

    def verify_all(self) -> None:
        """Verify every chunk now.

        Raises:
            ArtifactError: naming the first damaged chunk.
        """
        self._verify(0, len(self._map))

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
