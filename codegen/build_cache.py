"""Where built kernels are kept between runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qcompile.kept import cache_directory


def kernel_cache() -> Path:
    """`QCOMPILE_CACHE`/kernels, by default under ~/.cache/qcompile."""
    return cache_directory() / "kernels"


def failed_sources() -> Path:
    """`QCOMPILE_CACHE`/failed: sources that a compiler refused, to be reported."""
    return cache_directory() / "failed"


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: a reader sees the whole file or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
