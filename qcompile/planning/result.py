"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qcompile.ir.records import CoverageRow, MemoryPlan
from qcompile.passes.outline import OpenChoice
from qcompile.planning.needs import Needs
from qcompile.planning.speed import Speed
from qcompile.runtime.artifact_size import ArtifactSize
from qcompile.runtime.cache_layers import CacheLayer

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PlannedPass:
    """A pass of the pipeline.

    Attributes:
        spec: its name and options.
        reason: for its place; "" in a pipeline of the user's own.
        reads_values: whether it will read weights or calibration data, which the plan went without.
        nodes: of the graph after it.
        constant_bytes: of all constants after it.
    """

    spec: str
    reason: str
    reads_values: bool
    nodes: int
    constant_bytes: int


@dataclass(frozen=True)
class CompilationPlan:
    """What `compile` with the same arguments is going to do. Made by `qcompile.plan`, from shapes alone.

    Attributes:
        model: its name.
        target: `ARCH-SCHEME[-KV]`.
        pipeline: the passes as text that parses back.
        passes: in order.
        coverage: one row per linear, embedding, convolution, attention and so on: its format, or why it is left alone.
        cache: one row per layer of a model with a cache.
        size: of the artifact, with open choices made against a change.
        alternatives: the sizes that other choices would give.
        bits_per_weight: stored for the quantized matrices; None if nothing is quantized.
        memory: of the engine that runs it, by purpose.
        needs: of the compilation itself.
        speed: upper bounds of tokens a second; None for a model without a cache.
        choices: what only weights or data will decide, and what was assumed.
        notes: what else there is to know before the work.
    """

    model: str
    target: str
    pipeline: str
    passes: tuple[PlannedPass, ...]
    coverage: tuple[CoverageRow, ...]
    cache: tuple[CacheLayer, ...]
    size: ArtifactSize
    alternatives: tuple[ArtifactSize, ...]
    bits_per_weight: float | None
    memory: MemoryPlan
    needs: Needs
    speed: Speed | None
    choices: tuple[OpenChoice, ...]
    notes: tuple[str, ...] = ()

    @property
    def left_alone(self) -> list[CoverageRow]:
        """The rows of what is not quantized, or has no kernel, each with its reason."""
        return [row for row in self.coverage if row.reason]

    @property
    def size_range(self) -> tuple[int, int]:
        """The least and the most bytes of the artifact, whatever is decided."""
        totals = [size.total for size in (self.size, *self.alternatives)]
        return min(totals), max(totals)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model": self.model, "target": self.target, "pipeline": self.pipeline,
            "passes": [asdict(item) for item in self.passes],
            "coverage": [asdict(row) for row in self.coverage],
            "cache": [layer.to_dict() for layer in self.cache],
            "size": self.size.to_dict(), "size_range": list(self.size_range), "bits_per_weight": self.bits_per_weight,
            "memory": self.memory.to_dict(), "compilation": self.needs.to_dict(),
            "speed": None if self.speed is None else self.speed.to_dict(),
            "choices": [asdict(choice) for choice in self.choices], "notes": list(self.notes),
        }  # fmt: skip

    def tables(self) -> list[Table]:
        """For a terminal, with rich."""
        from qcompile.planning.tables import plan_tables

        return plan_tables(self)

    def report(self) -> str:
        """The tables as text."""
        from qcompile.dump.tables import written

        return written(self.tables())
