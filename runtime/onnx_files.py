"""The ONNX file inside an artifact, with the file of its constants if there is one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import ArtifactError
from qcompile.runtime.manifest import MANIFEST, checked_path, file_digest, require_digest

MODEL = "model.onnx"
NAMES = (MODEL, f"{MODEL}.data")
"""What an artifact may hold of them."""


@dataclass(frozen=True)
class OnnxFiles:
    """Files that are hashed when they are first used, as weights are; their sizes are known to be right.

    Attributes:
        root: of the artifact.
        entries: name -> size and hash, from the manifest.
    """

    root: Path
    entries: Mapping[str, Any]

    def verified(self) -> Path:
        """The model, after all files were found to be what the manifest says.

        Raises:
            ArtifactError: naming a file that is missing, truncated or changed.
        """
        for name, entry in self.entries.items():
            require_digest(checked_path(self.root, name, entry), file_digest(self.root / name), entry)
        return self.root / MODEL


def found_onnx(root: Path, entries: Any) -> OnnxFiles | None:
    """What a manifest lists, if anything.

    Raises:
        ArtifactError: for other names than an artifact has, a missing or a truncated file.
    """
    if entries is None:
        return None
    if not isinstance(entries, dict) or MODEL not in entries or not set(entries) <= set(NAMES):
        raise ArtifactError(f"{root / MANIFEST}: expected {' and '.join(NAMES)} under 'onnx', got {str(entries)[:80]}; compile again")
    for name, entry in entries.items():
        checked_path(root, name, entry)
    return OnnxFiles(root, entries)


def put_onnx(model: Path, directory: Path) -> dict[str, Any]:
    """Copy a model, and its constants if they lie beside it, into an artifact: name -> size and hash."""
    entries = {}
    for name in NAMES:
        source = model.with_name(name)
        if source.is_file():
            shutil.copyfile(source, directory / name)
            entries[name] = {"bytes": source.stat().st_size, "sha256": file_digest(directory / name)}
    return entries
