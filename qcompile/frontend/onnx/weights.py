"""Where the bytes of an initialiser are: in the parsed file or in a file beside it, read when asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from qcompile.errors import SourceError
from qcompile.frontend.onnx.kinds import BITS, KINDS, STORED, kind_name
from qcompile.ir.constants import Cast, Constant

_SMALL = 4096
_FLOAT4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def unpacked(raw: Tensor, kind: int, count: int) -> Tensor:
    """Bytes [n] of 2- or 4-bit elements as one element a byte (low bits first), or as float32 for 4-bit floats."""
    bits = BITS[kind]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = ((raw.view(torch.uint8).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    if kind == TensorProto.FLOAT4E2M1:
        return _FLOAT4[codes.long()]
    if kind in (TensorProto.UINT4, TensorProto.UINT2):
        return codes
    signed = codes.to(torch.int8)
    return torch.where(signed >= 1 << (bits - 1), signed - (1 << bits), signed)


@dataclass(frozen=True)
class Place:
    """A piece of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Weight:
    """An initialiser or a constant; also a constant's `Source`.

    Attributes:
        file: the ONNX file's name.
        name: in the graph.
        kind: ONNX's element type.
        shape: its shape.
        origin: the parsed tensor, or where its bytes lie in a file beside the model.
        scope: the branch that it belongs to, because two branches may use one name.
    """

    file: str
    name: str
    kind: int
    shape: tuple[int, ...]
    origin: TensorProto | Place = field(repr=False)
    scope: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as stored; 2- and 4-bit elements take a byte each."""
        return STORED[self.kind]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def key(self) -> str:
        """Small ones by value, so that equal constants are one; large ones by file and name."""
        if self.numel > _SMALL or isinstance(self.origin, Place):
            return f"onnx:{self.file}:{self.scope}{self.name}"
        flat = self.load().contiguous().reshape(-1).view(torch.uint8)
        return f"value:{kind_name(self.kind)}{list(self.shape)}:{hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"

    def load(self) -> Tensor:
        """Read it: from its place in the file, or from the parsed model."""
        if isinstance(self.origin, Place):
            raw = torch.from_numpy(np.fromfile(self.origin.path, np.uint8, self.origin.nbytes, offset=self.origin.offset))
            return (unpacked(raw, self.kind, self.numel) if self.kind in BITS else raw.view(self.dtype)).reshape(self.shape)
        array = numpy_helper.to_array(self.origin)
        if self.kind in BITS:
            wide = np.float32 if self.kind == TensorProto.FLOAT4E2M1 else np.int8
            return torch.from_numpy(np.array(array.astype(wide))).to(self.dtype).reshape(self.shape)
        if self.dtype in (torch.bfloat16, *_FLOAT8):
            return torch.from_numpy(np.array(array.view(np.uint16 if self.dtype == torch.bfloat16 else np.uint8))).view(self.dtype)
        return torch.from_numpy(np.array(array)).reshape(self.shape)

    def elements(self) -> list[Any]:
        """All elements in row-major order, without torch: a trace that is going on does not notice."""
        origin = self.origin
        if isinstance(origin, Place):
            raw = np.fromfile(origin.path, np.uint8, origin.nbytes, offset=origin.offset).tobytes()
            origin = TensorProto(data_type=self.kind, dims=self.shape, raw_data=raw)
        array = numpy_helper.to_array(origin)
        return list(array.astype(np.float64 if self.dtype.is_floating_point else np.int64).reshape(-1).tolist())

    def constant(self) -> Constant:
        """A handle for the graph; half precision is read as float32."""
        traced = KINDS[self.kind]
        return Constant(self) if self.dtype == traced else Constant(self).then(Cast(traced))

    def stand_in(self) -> Tensor:
        """A tensor to trace with, which takes address space and no memory."""
        return torch.empty(self.shape, dtype=KINDS[self.kind])


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def weight_of(proto: TensorProto, path: Path, scope: str = "") -> Weight:
    """The handle of one initialiser of the model at `path`, or of a branch of it.

    Raises:
        SourceError: for an element type that is not served, or bytes that are not where the model says.
    """
    where = f"{path}: initialiser {proto.name!r}"
    if proto.data_type not in KINDS:
        raise SourceError(
            f"{where}: expected numbers, got {kind_name(proto.data_type)}; export the model without it (text is tokenized outside)"
        )
    shape = tuple(proto.dims)
    if any(size < 0 for size in shape):
        raise SourceError(f"{where}: expected sizes of 0 and more, got the shape {shape}; export the model again")
    origin: TensorProto | Place = proto
    if proto.data_location == TensorProto.EXTERNAL:
        origin = _place({item.key: item.value for item in proto.external_data}, path, where, _nbytes(proto.data_type, shape))
    else:
        _check_embedded(proto, where, shape)
    return Weight(path.name, proto.name, proto.data_type, shape, origin, scope)


def _nbytes(kind: int, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return -(-count * BITS[kind] // 8) if kind in BITS else count * STORED[kind].itemsize


def _check_embedded(proto: TensorProto, where: str, shape: tuple[int, ...]) -> None:
    expected = _nbytes(proto.data_type, shape)
    if proto.HasField("raw_data"):
        found, unit = len(proto.raw_data), "bytes"
    else:
        held = (proto.float_data, proto.int32_data, proto.int64_data, proto.double_data, proto.uint64_data)
        found, unit = max(map(len, held)), "elements"
        expected = expected if proto.data_type in BITS else math.prod(shape)
    if found != expected:
        raise SourceError(f"{where}: expected {expected} {unit} for the shape {shape}, got {found}; export or download the model again")


def _place(entries: Mapping[str, str], path: Path, where: str, expected: int) -> Place:
    location = entries.get("location", "")
    if not location:
        raise SourceError(f"{where}: expected the name of the file that holds it, got none; save the model again")
    if Path(location).is_absolute() or ".." in Path(location).parts or "\\" in location:
        raise SourceError(
            f"{where}: expected external data beside the model, got the path {location!r}, which leaves its folder; "
            "save the model again with data beside it, and do not trust this file"
        )
    file = path.parent / location
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise SourceError(
            f"{where}: expected external data beside the model, got {location!r}, a link out of its folder; copy the file to its place"
        )
    if not file.is_file():
        raise SourceError(f"{where}: expected external data in {file}, got no such file; put it beside the model")
    offset, length = _integer(entries, "offset", 0, where), _integer(entries, "length", expected, where)
    if length != expected:
        raise SourceError(
            f"{where}: expected {expected} bytes of external data for its shape, got a length of {length}; save the model again"
        )
    size = file.stat().st_size
    if offset < 0 or offset + length > size:
        raise SourceError(
            f"{where}: expected {length} bytes from offset {offset} of {file}, got a file of {size} bytes; download the model again"
        )
    return Place(file, offset, length)


def _integer(entries: Mapping[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not text.isdecimal():
        raise SourceError(f"{where}: expected a number as {key} of its external data, got {text!r}; save the model again")
    return int(text)
