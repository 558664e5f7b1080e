"""What is kept between runs stays below its limit, and nobody's work is taken away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.kept import cache_directory, make_room, mark_used


def entry(directory: Path, name: str, size: int, used: int) -> Path:
    """A directory with one file below another."""
    path = directory / name
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "data").write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    entries = [entry(tmp_path, name, 100, used) for name, used in (("b", 2), ("a", 1), ("c", 3))]
    (tmp_path / "file").write_bytes(b"x" * 100)
    os.utime(tmp_path / "file", (0, 0))
    assert make_room(tmp_path, 0, limit=400) == 0
    assert make_room(tmp_path, 50, limit=400) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    mark_used(entries[1])
    assert make_room(tmp_path, 0, limit=250, held=(entries[0],)) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "the oldest was used, the next is held"


def test_what_is_in_use_stays_though_there_is_no_room(tmp_path: Path) -> None:
    made = entry(tmp_path, "new", 100, 1)
    mark_used(made)
    assert make_room(tmp_path, 10, limit=50) == -60
    assert (made / "inner" / "data").exists()
    os.utime(made, (1, 1))
    assert make_room(tmp_path, 10, limit=50) == 40
    assert list(tmp_path.iterdir()) == []


def test_it_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("QCOMPILE_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "qcompile"
