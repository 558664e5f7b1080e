"""Finished results on disk, so that work that was interrupted continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qcompile import ir, quant
from qcompile.ir.constants import Constant, RoundedSource, SafetensorsSource, TensorSource
from qcompile.ir.graph import Graph
from qcompile.ir.tensor_file import DTYPES
from qcompile.kept import LIMIT_BYTES, cache_directory, make_room, mark_used

_LOOKS = 64
"""How often a store is looked through, at least, while it fills."""


def work_directory() -> Path:
    """`QCOMPILE_CACHE`/work, by default under ~/.cache/qcompile."""
    return cache_directory() / "work"


def program_key() -> str:
    """Sixteen hex digits over this package's own source: another version makes other results."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).resolve().parent
    for folder in (root, *(Path(str(room.__file__)).parent for room in (ir, quant))):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class WorkStore:
    """Named results (dicts of tensors) as safetensors files; what is there is whole, because files are renamed into place.

    Results are told apart by a hash of `key` (what was worked on, with what data and options) and their name.
    """

    def __init__(self, key: str, directory: Path | None = None, limit: int = LIMIT_BYTES) -> None:
        """Results of the work that `key` describes, in `directory` (default: `work_directory()`), at most `limit` bytes in all."""
        self.directory = directory or work_directory()
        self.key = key
        self._limit = limit
        self._shelf = _Shelf()

    def part(self, key: str) -> WorkStore:
        """The results of one part of the work, or of the work done in one way."""
        part = WorkStore(f"{self.key}|{key}", self.directory, self._limit)
        part._shelf = self._shelf
        return part

    def get(self, name: str) -> dict[str, Constant] | None:
        """The tensors of a finished result as constants that read them when needed, or None if there is none, or a damaged one."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != {"key": self.key, "name": name}:
                    return None
                slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118  not a dict
                forms = {tensor: (tuple(item.get_shape()), DTYPES[item.get_dtype()]) for tensor, item in slices.items()}
            mark_used(path)
            self._shelf.held.add(path)
        except (OSError, SafetensorError, KeyError):
            return None
        return {tensor: Constant(SafetensorsSource(path, tensor, shape, dtype)) for tensor, (shape, dtype) in forms.items()}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Constant]:
        """Keep a finished result, and return it as `get` would."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        coming = sum(tensor.nbytes for tensor in tensors.values())
        if coming > self._shelf.room:
            self._prune(coming)
        self._shelf.room -= coming
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            contents = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(contents, temporary, metadata={"key": self.key, "name": name})
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        found = self.get(name)
        assert found is not None
        return found

    def _path(self, name: str) -> Path:
        return self.directory / f"{hashlib.sha256(f'{self.key}|{name}'.encode()).hexdigest()[:32]}.safetensors"

    def _prune(self, coming: int) -> None:
        """Make room, but not by files that this process hands out."""
        room = make_room(self.directory, coming, limit=self._limit, pattern="*.safetensors", held=self._shelf.held)
        self._shelf.room = coming + min(max(0, room), self._limit // _LOOKS)


@dataclass
class _Shelf:
    """What the parts of one store share.

    Attributes:
        held: files that were handed out.
        room: bytes that may be added before the directory is looked through again: it holds thousands of files, and others add to it too.
    """

    held: set[Path] = field(default_factory=set)
    room: int = 0


def content_key(graph: Graph) -> str:
    """Thirty-two hex digits over the structure of a graph and what is in its constants: equal in another process.

    Unlike `fingerprint`, tensors in memory count by their bytes, files by path, size and time of change.
    """
    digest = hashlib.sha256()
    seen: dict[int, str] = {}
    for node in graph.fx.nodes:
        key = _constant_key(graph.constants[str(node.target)], seen) if node.op == "get_attr" else ""
        digest.update(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {key}\n".encode())
    return digest.hexdigest()[:32]


def _constant_key(constant: Constant, seen: dict[int, str]) -> str:
    return "|".join((_source_key(constant, seen), *map(str, constant.transforms)))


def _source_key(constant: Constant, seen: dict[int, str]) -> str:
    source = constant.source
    if isinstance(source, RoundedSource):
        return f"{_constant_key(source.rounding.weight, seen)}|{source.rounding.form}.{source.part}"
    if isinstance(source, TensorSource):
        if id(source) not in seen:
            flat = source.load().contiguous().reshape(-1).view(torch.uint8).numpy()
            seen[id(source)] = f"{source.dtype}{source.shape}{hashlib.sha256(flat.tobytes()).hexdigest()}"
        return seen[id(source)]
    path = getattr(source, "path", None)
    if isinstance(path, Path) and path.is_file():
        status = path.stat()
        return json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, source.key])
    return source.key
