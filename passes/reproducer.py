"""One file that repeats what a pass did wrong: the graph before it with constants and inputs, and the pass as text."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompile.errors import ArtifactError, FormatError, SourceError
from qcompile.ir.constants import Cast, Constant, SafetensorsSource, tensor_constant
from qcompile.ir.deserialize import graph_from_json
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Backend
from qcompile.ir.memory import dtype_of
from qcompile.ir.serialize import format_of, graph_to_json
from qcompile.ir.tensor_file import DTYPES, write_constants
from qcompile.kept import cache_directory
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.calibration import Calibration
from qcompile.passes.calibration_data import CalibrationData
from qcompile.quant.scheme import dtype_name
from qcompile.quant.scheme_json import scheme_from_json, scheme_to_json
from qcompile.target import Target
from qcompile.version import __version__

FORMAT = "qcompile reproducer 1"
_CONSTANT, _TOKENS, _SAMPLE = "constant/", "calibration/tokens", "calibration/sample/"
_HASH = b'"sha256":"'
_CHUNK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100 << 20
"""The limit that safetensors itself sets."""
_OPTIONS = ("max_batch", "max_context", "prefill_chunk", "fuel")


@dataclass(frozen=True)
class Reproducer:
    """What a file holds.

    Attributes:
        path: the file.
        graph: before the pass, with example inputs; constants are read from the file when needed.
        spec: of the pass.
        target: what was compiled for.
        tolerance: that was exceeded.
        error: what was said.
        options: of the `PassContext`.
        calibration: the data that had been read, None if there was none.
    """

    path: Path
    graph: Graph
    spec: str
    target: Target
    tolerance: float
    error: str
    options: Mapping[str, Any]
    calibration: CalibrationData | None

    def context(self, backend: Backend | None = None) -> PassContext:
        """What the pass was given, anew."""
        data = self.calibration
        calibration = None if data is None else Calibration(lambda: data)
        return PassContext(self.target, backend, calibration=calibration, **self.options)


def reproducers_directory() -> Path:
    """`QCOMPILE_CACHE`/reproducers, by default under ~/.cache/qcompile."""
    return cache_directory() / "reproducers"


def keep(directory: Path, graph: Graph, step: Pass, ctx: PassContext, tolerance: float, error: str) -> Path:
    """Write a reproducer into `directory`; the same pass on the same graph replaces its own.

    Raises:
        SourceError: if the directory cannot be written to.
        ArtifactError: if the graph cannot be stored, naming the node.
    """
    key = hashlib.sha256(f"{graph.fingerprint()} {step.spec}".encode()).hexdigest()[:12]
    path = directory / f"{step.name}-{key}.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_reproducer(path, graph, step.spec, ctx, tolerance, error)
    except OSError as problem:
        raise SourceError(f"{path}: expected a reproducer that can be written, got {problem}; free space, or set QCOMPILE_CACHE") from None
    return path


def write_reproducer(path: Path, graph: Graph, spec: str, ctx: PassContext, tolerance: float = 0.0, error: str = "") -> None:
    """Write the file whole or not at all, one constant in memory at a time."""
    stored = {name: _stored(constant) for name, constant in graph.constants.items()}
    tensors = {f"{_CONSTANT}{name}": constant for name, (constant, _) in stored.items()}
    samples = _calibration_tensors(ctx)
    content = {
        "qcompile": __version__,
        "graph": graph_to_json(graph),
        "casts": {name: dtype for name, (_, dtype) in stored.items() if dtype is not None},
        "pass": spec,
        "target": {"arch": ctx.target.arch, "scheme": scheme_to_json(ctx.target.scheme)},
        "tolerance": tolerance,
        "error": error,
        "options": {name: getattr(ctx, name) for name in _OPTIONS},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        write_constants(Path(temporary), tensors | samples, {"format": FORMAT, "content": text, "sha256": "0" * 64})
        _seal(Path(temporary))
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _stored(constant: Constant) -> tuple[Constant, str | None]:
    """The constant before the cast at the end of its log, and that cast: passes that round look behind it."""
    last = constant.transforms[-1] if constant.transforms else None
    if not isinstance(last, Cast):
        return constant, None
    return replace(constant, transforms=constant.transforms[:-1]), dtype_name(last.to)


def _calibration_tensors(ctx: PassContext) -> dict[str, Constant]:
    """The data, if any pass has read it: what has not been read had no part in this."""
    data = ctx.calibration.known if ctx.calibration is not None else None
    if data is None:
        return {}
    if data.tokens is not None:
        return {_TOKENS: tensor_constant(data.tokens)}
    found: dict[str, Constant] = {}
    for index, sample in enumerate(data.samples):
        named = sample if isinstance(sample, Mapping) else dict(enumerate(sample)) if isinstance(sample, tuple | list) else {"": sample}
        found |= {f"{_SAMPLE}{index}/{name}": tensor_constant(leaf) for name, leaf in named.items() if isinstance(leaf, Tensor)}
    return found


def _seal(path: Path) -> None:
    """Put the hash of the file, with zeros in the place that was left for it, into that place."""
    digest, place = _digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest)


def _digest(path: Path) -> tuple[bytes, int]:
    """SHA-256 of a file as if the hash that it gives for itself were zeros, and where that hash stands.

    Raises:
        ValueError: if it gives none.
    """
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), _MAX_HEADER_BYTES))
        place = head.index(_HASH) + len(_HASH)
        digest = hashlib.sha256(head[:place] + b"0" * 64 + head[place + 64 :])
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest().encode(), place


def load_reproducer(path: str | os.PathLike[str]) -> Reproducer:
    """Read what `write_reproducer` wrote; nothing is unpickled, and the graph may call allow-listed operators only.

    Raises:
        SourceError: if the file is missing, damaged, of another kind or another version.
    """
    file = Path(path)
    content, shapes = _read(file)
    try:
        return _reproducer(file, content, shapes)
    except (ArtifactError, FormatError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{file}: expected what qcompile {__version__} writes, got {error} (written by {content.get('qcompile')})"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """The content of a file and its tensors' shapes and dtypes."""
    foreign = f"{path}: expected a reproducer that `check=True` or a crash left (a safetensors file of the format {FORMAT!r})"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            shapes = {name: (tuple(item.get_shape()), DTYPES[item.get_dtype()]) for name, item in slices.items()}
        if metadata.get("format") != FORMAT:
            raise SourceError(f"{foreign}, got {metadata.get('format', 'a file of another kind')!r}")
        if _digest(path)[0].decode() != metadata.get("sha256"):
            raise SourceError(f"{path}: damaged: its contents do not have the SHA-256 that it gives for itself; copy it again")
        return json.loads(metadata["content"]), shapes
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SourceError(f"{foreign}, got {type(error).__name__}: {error}") from None


def _reproducer(path: Path, content: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Reproducer:
    stored = content["graph"]["constants"]
    constants = {name: _constant(path, name, item, content["casts"].get(name), shapes) for name, item in stored.items()}
    graph = graph_from_json(content["graph"], constants)
    target = Target(str(content["target"]["arch"]), scheme_from_json(content["target"]["scheme"]))
    options = {name: content["options"][name] for name in _OPTIONS}
    graph.verify()
    return Reproducer(
        path, graph, str(content["pass"]), target, float(content["tolerance"]), str(content["error"]), options, _calibration(path, shapes)
    )


def _constant(
    path: Path, name: str, item: Mapping[str, Any], cast: str | None, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Constant:
    form = item.get("format")
    shape, dtype = shapes[f"{_CONSTANT}{name}"]
    source = SafetensorsSource(path, f"{_CONSTANT}{name}", shape, dtype)
    transforms = () if cast is None else (Cast(dtype_of(cast, name)),)
    return Constant(source, transforms, None if form is None else format_of(str(form), name))


def _calibration(path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> CalibrationData | None:
    def tensor(name: str) -> Tensor:
        return SafetensorsSource(path, name, *shapes[name]).load()

    if _TOKENS in shapes:
        return CalibrationData("the reproducer's tokens", tensor(_TOKENS))
    samples: dict[int, dict[str, Tensor]] = {}
    for name in shapes:
        if name.startswith(_SAMPLE):
            index, _, key = name.removeprefix(_SAMPLE).partition("/")
            samples.setdefault(int(index), {})[key] = tensor(name)
    return (
        CalibrationData("the reproducer's inputs", samples=tuple(_sample(samples[index]) for index in sorted(samples))) if samples else None
    )


def _sample(leaves: Mapping[str, Tensor]) -> Any:
    """A tensor, a tuple, or a mapping, as its names say."""
    if list(leaves) == [""]:
        return leaves[""]
    if all(name.isdecimal() for name in leaves):
        return tuple(leaves[str(index)] for index in range(len(leaves)))
    return dict(leaves)
