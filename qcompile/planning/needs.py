"""What a compilation holds in memory and on disk, told from what it is going to do."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.execution import Limits
from qcompile.passes.learn_rounding import LEARNING_BYTES, Learning

_WRITE_COPIES = 5
"""Float32 copies of a weight at the peak of rounding it alone: itself, scaled, rounded, clamped, and what is being made (measured)."""
_SEARCH_COPIES = 8
"""The same where the scale is searched for (`mse-clip`), or columns are rounded one after the other (`gptq`)."""
_MOMENT_COPIES = 6
"""Float32 copies of a second moment [K, K]: itself, one in column order, and two in float64 while it is factorised."""


@dataclass(frozen=True)
class Rounded:
    """A matrix [N, K] that is rounded together with those that read the same value; N counts them all."""

    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """In float32."""
        return 4 * self.rows * self.columns


@dataclass
class Needs:
    """Bytes by what they are for.

    Attributes:
        memory: what is held at once at the peak.
        disk: what is written, in the artifact's folder, the work cache and the system's temporary folder.
    """

    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def peak_memory(self) -> int:
        """Of the process."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Of all files."""
        return sum(self.disk.values())
