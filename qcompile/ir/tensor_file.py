"""A safetensors file of constants, written one tensor at a time: a model that does not fit in memory fits in a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import ArtifactError
from qcompile.ir.constants import Constant, RoundedSource

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""Name in a file -> dtype."""


def write_constants(path: Path, constants: Mapping[str, Constant], metadata: Mapping[str, str] | None = None) -> None:
    """Write every constant; they are materialised one at a time, the parts of one rounding one after the other.

    Wider elements come first in the file, so that each tensor is aligned to its own element size and can be used where it lies.
    `metadata` is text by name, kept in the file's header.

    Raises:
        ArtifactError: for a dtype that safetensors has no name for.
    """
    header, text, size = constants_header(constants, metadata)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + size)
        for name in _writing_order(constants):
            file.seek(start + header[name]["data_offsets"][0])
            file.write(_bytes(constants[name], name))


def constants_bytes(constants: Mapping[str, Constant]) -> int:
    """Bytes of the file that `write_constants` makes of these constants, none of which is read."""
    _, text, size = constants_header(constants)
    return 8 + len(text) + size


def constants_header(constants: Mapping[str, Constant], metadata: Mapping[str, str] | None = None) -> tuple[dict[str, Any], bytes, int]:
    """Name -> dtype, shape and place; the same as padded JSON; and the bytes of all tensors.

    Raises:
        ArtifactError: for a dtype that safetensors has no name for.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
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
