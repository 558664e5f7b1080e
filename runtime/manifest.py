"""manifest.json: what is in an artifact, with the hash of every file and of itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from qcompile.errors import ArtifactError

SCHEMA_VERSION = 1
"""Raised whenever an older reader would misunderstand what is written; there is no reading across versions."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
MANIFEST, GRAPH, PLAN, WEIGHTS, KERNELS = "manifest.json", "graph.json", "plan.json", "weights.safetensors", "kernels/kernels.json"


def canonical(data: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal(data: dict[str, Any]) -> bytes:
    """The manifest's bytes, with the schema version and the hash of everything else in it; indented, because people read it."""
    body = data | {"schema_version": SCHEMA_VERSION}
    sealed = body | {"sha256": hashlib.sha256(canonical(body)).hexdigest()}
    return json.dumps(sealed, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def file_entry(content: bytes) -> dict[str, Any]:
    """Size and hash of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def parse(content: bytes, path: Path) -> Any:
    """Parse JSON.

    Raises:
        ArtifactError: naming the file.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected JSON, got {type(error).__name__}: {error}; copy the artifact again") from error


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the artifact in `root`, of this schema version and undamaged.

    Raises:
        ArtifactError: saying which of these it is not.
    """
    path = root / MANIFEST
    if not root.is_dir():
        raise ArtifactError(
            f"{root}: expected the directory of an artifact, got {'a file' if root.exists() else 'nothing'}; give the "
            "directory that save() or `qcompile compile -o` wrote"
        )
    if not path.is_file():
        raise ArtifactError(
            f"{root}: expected an artifact, got a directory without {MANIFEST}; an interrupted save leaves no artifact: save again"
        )
    content = path.read_bytes()
    data = parse(content, path)
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ArtifactError(f"{path}: expected an object with schema_version, got {type(data).__name__}; copy the artifact again")
    if data["schema_version"] != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {data['schema_version']} (written by qcompile "
            f"{data.get('qcompile')}); compile the model again, or use that version"
        )
    body = {key: value for key, value in data.items() if key != "sha256"}
    if _resealed(body) != content:
        raise ArtifactError(f"{path}: damaged: its contents do not have the SHA-256 that it gives for itself; copy the artifact again")
    for key in ("files", "weights"):
        if not isinstance(data.get(key), dict):
            raise ArtifactError(f"{path}: expected an object {key!r}, got {type(data.get(key)).__name__}; compile again")
    return data


def _resealed(body: dict[str, Any]) -> bytes:
    """What `seal` makes of a manifest's values; nothing for values that it never writes."""
    try:
        return seal(body)
    except (ValueError, RecursionError):
        return b""


def require_name(name: str) -> str:
    """A plain file name, as it is.

    Raises:
        ArtifactError: for one with separators or other characters that a path gives a meaning to.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{name!r}: expected a plain file name of letters, digits and _.+-; rename it")
    return name


def read_checked(root: Path, name: str, entry: Any) -> bytes:
    """The bytes of a file of the artifact, which must lie inside it and be what the manifest says.

    Raises:
        ArtifactError: for a path outside the directory, a missing, truncated or changed file, naming it.
    """
    path = checked_path(root, name, entry)
    content = path.read_bytes()
    require_digest(path, hashlib.sha256(content).hexdigest(), entry)
    return content


def file_digest(path: Path) -> str:
    """SHA-256 of a file that may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_digest(path: Path, digest: str, entry: Any) -> None:
    """Refuse a file whose hash is not the manifest's.

    Raises:
        ArtifactError: naming it.
    """
    if digest != entry.get("sha256"):
        raise ArtifactError(f"{path}: damaged: its contents do not have the SHA-256 that the manifest gives; copy the artifact again")


def checked_path(root: Path, name: str, entry: Any) -> Path:
    """The path of a file of the artifact, which lies inside it and has the size that the manifest says.

    Raises:
        ArtifactError: for a path outside the directory, a missing or a truncated file, naming it.
    """
    if not all(map(_NAME.fullmatch, name.split("/"))):
        raise ArtifactError(f"{root / MANIFEST}: expected files inside the artifact, got {name!r}; do not load this artifact")
    path = root / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ArtifactError(
            f"{root / MANIFEST}: expected files inside the artifact, got {name!r}, a link to {os.path.realpath(path)}; "
            "do not load this artifact"
        )
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a file of the artifact, got none; copy the artifact again")
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if path.stat().st_size != size:
        raise ArtifactError(
            f"{path}: expected {size} bytes, got {path.stat().st_size}: it is truncated or was changed; copy the artifact again"
        )
    return path
