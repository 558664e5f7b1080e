"""These tests run in a process of their own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.codegen.triton.interpreted.interpreter import install

    install()
