"""Golden files: text that must not change unnoticed. `ACCEPT_GOLDEN=1` writes what came."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent


def assert_golden(name: str, text: str) -> None:
    """Compare `text` with the golden file `name`; with ACCEPT_GOLDEN=1 write it."""
    path = _FOLDER / name
    if os.environ.get("ACCEPT_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{name}: expected a golden file; look at the text and accept it with ACCEPT_GOLDEN=1"
    assert text == path.read_text(), f"{name} changed; if it is meant, accept it with ACCEPT_GOLDEN=1"
