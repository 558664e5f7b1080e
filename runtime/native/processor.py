"""What this machine's processor has."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from qcompile.ir.native import INSTRUCTION_SETS, library_name

CPUINFO = Path("/proc/cpuinfo")


@cache
def features() -> frozenset[str]:
    """Extensions of the instruction set as Linux calls them; none where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def runs_here(name: str) -> bool:
    """Whether this processor has the instruction set called `name`."""
    return INSTRUCTION_SETS[name] <= features()


def best_library(files: Iterable[str]) -> str | None:
    """Of an artifact's files the library for the best instruction set that this processor has; None if there is none for it."""
    there = set(files)
    names = (library_name(platform.machine(), name) for name in INSTRUCTION_SETS if runs_here(name))
    return next((name for name in names if name in there), None)
