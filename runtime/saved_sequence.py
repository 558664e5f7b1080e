"""A sequence outside of its engine: what the cache held of it, in memory or in a file, whatever the pages it lay in."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompile.errors import ArtifactError
from qcompile.ir.constants import Constant
from qcompile.quant.scheme import dtype_name

KIND, VERSION = "qcompile sequence", "1"
"""What a file says of itself; the version counts the ways in which sequences were laid out."""
HEADER = {"kind", "version", "model", "cache", "length", "tokens", "sha256"}


@dataclass(frozen=True)
class SavedSequence:
    """A sequence that left its engine and can return to it, or go to another.

    Attributes:
        length: tokens that were stored.
        tokens: these tokens; None where the engine did not see them (chosen on a device).
        stored: cache buffer -> [L, T, D] (`KVCache.read`).
    """

    length: int
    tokens: tuple[int, ...] | None
    stored: Mapping[str, Tensor]


@dataclass(frozen=True)
class Origin:
    """Where a sequence can be continued: a model, by the hash of its constants, and a cache format, in words."""

    model: str
    cache: str


def fingerprint(constants: Mapping[str, Constant]) -> str:
    """Sixteen hex digits over the names, shapes and bytes of a model's constants."""
    digest = hashlib.sha256()
    for name in sorted(constants):
        tensor = constants[name].materialize().contiguous()
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def checksum(stored: Mapping[str, Tensor]) -> str:
    """SHA-256 over what a cache held."""
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(_bytes(stored[name]))
    return digest.hexdigest()


def write_sequence(path: str | os.PathLike[str], saved: SavedSequence, origin: Origin) -> None:
    """Write a safetensors file, whole or not at all; an existing one is replaced.

    Raises:
        ArtifactError: if the file cannot be written.
    """
    from safetensors.torch import save_file

    target = Path(path)
    header = {
        "kind": KIND, "version": VERSION, "model": origin.model, "cache": origin.cache, "length": str(saved.length),
        "tokens": json.dumps(saved.tokens), "sha256": checksum(saved.stored),
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            part = Path(scratch) / "sequence"
            save_file(dict(saved.stored), part, metadata=header)
            part.replace(target)
    except OSError as error:
        raise ArtifactError(f"save: {target}: expected a path that can be written, got {error}; choose another or make room") from error


def read_sequence(path: str | os.PathLike[str], origin: Origin) -> SavedSequence:
    """Read what `write_sequence` wrote for the same model and cache format.

    Raises:
        ArtifactError: for no such file, a damaged one, another version, another model or another cache format, with the remedy.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ArtifactError(f"restore: {path}: expected a file that save() wrote, got none there; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"restore: {path}: expected a whole file that save() wrote, got {error}; copy it again, or save anew"
        ) from error
    _require_header(path, header, origin)
    if header.get("sha256") != checksum(stored):
        raise ArtifactError(f"restore: {path}: expected the bytes that save() wrote, got others; copy it again, or save anew")
    return SavedSequence(*_counted(path, header), stored)


def _counted(path: str | os.PathLike[str], header: Mapping[str, str]) -> tuple[int, tuple[int, ...] | None]:
    """The length, and the tokens if they are known."""
    text = header["length"]
    try:
        tokens = json.loads(header["tokens"])
        known = None if tokens is None else tuple(map(int, tokens))
    except (ValueError, TypeError):
        known = ()
    if not text.isdecimal() or not int(text) or (known is not None and len(known) != int(text)):
        count = "" if known is None else f" and {len(known)} tokens"
        raise ArtifactError(
            f"restore: {path}: expected a header that counts tokens, got length={text!r}{count}; copy it again, or save anew"
        )
    return int(text), known


def _require_header(path: str | os.PathLike[str], header: Mapping[str, str], origin: Origin) -> None:
    if header.get("kind") != KIND or HEADER - header.keys():
        raise ArtifactError(f"restore: {path}: expected a file that save() wrote, got other tensors; check the path")
    if header.get("version") != VERSION:
        raise ArtifactError(
            f"restore: {path}: expected layout version {VERSION}, got {header.get('version')}; save it with this version of qcompile"
        )
    if header["cache"] != origin.cache:
        raise ArtifactError(
            f"restore: {path}: expected a sequence of a cache with {origin.cache}, got {header['cache']}; load the model that was compiled "
            "with that cache format, or read the tokens again"
        )
    if header["model"] != origin.model:
        raise ArtifactError(
            f"restore: {path}: expected a sequence of model {origin.model}, got one of {header['model']}; load the artifact that saved it, "
            "or read the tokens again"
        )
