"""Files, written one tensor at a time: no more of a model stands in memory than its largest constant.

A protobuf message may be written in parts: what is appended to a serialized message is merged into it as it is read. So a single file
gets its constants one after the other behind everything else; above `EXTERNAL_BYTES` they go to a file of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

EXTERNAL_BYTES = 1 << 30
"""Above so many bytes of constants these get a file of their own; protobuf ends at 2 GiB."""
_ALIGNED = 64
"""Where a constant begins in its file: a multiple of this."""
_SMALL = 1024
"""Bytes of a constant that always stays in the first file: shapes and numbers that a checker wants to see."""


def write(model: ir.Model, path: Path, *, external_data: bool | None = None) -> list[Path]:
    """Write a model; `external_data` puts constants beside it, by default if they are large. The files that were written."""
    constants = list(model.graph.initializers.values())
    total = sum(value.const_value.nbytes for value in constants if value.const_value is not None)
    model.graph.initializers.clear()
    proto = ir.to_proto(model)
    apart = external_data if external_data is not None else total > EXTERNAL_BYTES
    beside = path.with_name(f"{path.name}.data")
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        if not apart:
            for value in constants:
                file.write(_part(ir.to_proto(_loaded(value))))
            return [path]
        with beside.open("wb") as data:
            for value in constants:
                file.write(_part(_stored(value, data, beside.name)))
    return [path, beside]


def _loaded(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    return tensor


def _part(tensor: onnx.TensorProto) -> bytes:
    """A model of nothing but one constant."""
    part: bytes = onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString(deterministic=True)
    return part


def _stored(value: ir.Value, data: BinaryIO, location: str) -> onnx.TensorProto:
    """A constant, its bytes in `data` unless they are few."""
    tensor = _loaded(value)
    if tensor.nbytes <= _SMALL:
        return ir.to_proto(tensor)
    assert isinstance(tensor, ir.LazyTensor)
    data.write(b"\0" * (-data.tell() % _ALIGNED))
    offset = data.tell()
    tensor.tofile(data)  # from where it lies: its bytes are no second copy
    proto = onnx.TensorProto(name=value.name, data_type=tensor.dtype.value, data_location=onnx.TensorProto.EXTERNAL)
    proto.dims.extend(tensor.shape.numpy())
    for key, entry in (("location", location), ("offset", str(offset)), ("length", str(data.tell() - offset))):
        proto.external_data.add(key=key, value=entry)
    return proto
