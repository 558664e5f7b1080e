"""The ONNX file that an engine runs: made once, kept in the cache for artifacts that were saved."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from pathlib import Path

from qcompile.exporters.onnx.check import newest_opset
from qcompile.exporters.onnx.export import export
from qcompile.exporters.onnx.model import make_model
from qcompile.ir.graph import Graph
from qcompile.kept import cache_directory, make_room, mark_used
from qcompile.runtime.artifact import ArtifactContents

PROFILE = "ort"
"""Operators of onnxruntime where it is faster with them; packed weights are multiplied with floats (`accuracy_level` 0)."""


def require_exportable(graph: Graph) -> None:
    """Refuse a graph that ONNX does not express, before anything is written.

    Raises:
        ExportError: naming the first node and why.
    """
    make_model(graph, newest_opset(), PROFILE, logits_to_keep=True)


def serving_file(contents: ArtifactContents) -> Path:
    """The file of a compiled model: for one that was saved under `QCOMPILE_CACHE`/onnx, else in a directory that goes when `contents` does.

    What is kept there stays below a limit (`qcompile.kept`).

    Raises:
        ExportError: as `export`.
    """
    if not contents.digest:
        directory = Path(tempfile.mkdtemp(prefix="qcompile-onnx-"))
        weakref.finalize(contents, shutil.rmtree, directory, ignore_errors=True)
        return _exported(contents, directory)
    kept = cache_directory() / "onnx" / _key(contents.digest)
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=kept.parent) as scratch:
            made = _exported(contents, Path(scratch) / "model").parent
            make_room(kept.parent, 0, held=(kept,))
            if not kept.is_dir():  # another process may have been faster
                made.rename(kept)
    mark_used(kept)
    return kept / "model.onnx"


def _exported(contents: ArtifactContents, directory: Path) -> Path:
    return export(contents.graph, directory, contents.assets, profile=PROFILE, logits_to_keep=True).path


def _key(digest: str) -> str:
    """Of an artifact, this exporter and the opset that the file is written in."""
    sources = sorted(Path(__file__).resolve().parent.rglob("*.py"))
    content = [digest.encode(), str(newest_opset()).encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:32]
