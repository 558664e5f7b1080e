"""Where built kernels are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def kernel_cache() -> Path:
    """`QCOMPILE_CACHE`/kernels, by default under ~/.cache/qcompile."""
    root = os.environ.get("QCOMPILE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "qcompile") / "kernels"


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: a reader sees the whole file or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
