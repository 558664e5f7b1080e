"""What is kept between runs under `QCOMPILE_CACHE`: where it lies, and how it stays below a limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

LIMIT_BYTES = 20 << 30
"""What each kind of thing may take; what has not been used for longest goes first."""
_IN_USE_SECONDS = 3600


def cache_directory() -> Path:
    """`QCOMPILE_CACHE`, by default ~/.cache/qcompile."""
    root = os.environ.get("QCOMPILE_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "qcompile"


def mark_used(entry: Path) -> None:
    """Note that a file or directory is used now: the time of its last change says so to every process."""
    os.utime(entry)


def make_room(directory: Path, coming: int, *, limit: int = LIMIT_BYTES, pattern: str = "*", held: Collection[Path] = ()) -> int:
    """Remove entries of `directory` that match `pattern`, least recently used first, until `coming` bytes fit below `limit`.

    Entries are files, or directories with all that is in them. Those in `held`, and those that any process used within the last hour, stay.
    Others may do the same beside it. Returns the bytes that fit behind what is coming; less than 0 where too much is in use.
    """
    recent = time.time() - _IN_USE_SECONDS
    found = [(used, size, path) for path in directory.glob(pattern) for used, size in _seen(path)]
    room = limit - coming - sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        if room < 0 and used < recent and path not in held:
            _remove(path)
            room += size
    return room


def _seen(path: Path) -> list[tuple[float, int]]:
    """When an entry was last used and its bytes; nothing if another process took it away."""
    try:
        status = path.stat()
        inside = [file.stat().st_size for file in path.rglob("*") if file.is_file()] if path.is_dir() else [status.st_size]
    except FileNotFoundError:
        return []
    return [(status.st_mtime, sum(inside))]


def _remove(path: Path) -> None:
    """A directory goes under another name first: who looks for it finds all of it or nothing."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), tempfile.TemporaryDirectory(prefix=".old-", dir=path.parent) as grave:
        shutil.move(path, Path(grave) / path.name)
