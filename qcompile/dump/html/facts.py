"""What a report is made of: everything a dump holds, or as much of it as an artifact does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile.ir.records import CoverageRow

Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """A compilation as JSON values, in the forms of the dump's files (`docs/reading-a-dump.md`).

    Attributes:
        title: the model's name.
        target: what it was compiled for.
        pipeline: the passes as text.
        complete: whether the compilation got to its end.
        passes: rows of `passes.json`.
        graphs: lines of `graphs.jsonl`: the input and what each pass left.
        coverage: one row per operator that has weights or a cache.
        notes: what passes left alone, and why.
        cache: one row per attention.
        sizes: bytes and bits by name.
        kernels: as in `kernels.json`, each with its `source` where it has one.
        distributions: `weights` and `activations`, before and after.
        blame: attribution of the KL divergence, where `qcompile blame` made one.
    """

    title: str
    target: str
    pipeline: str
    complete: bool = True
    passes: list[Row] = field(default_factory=list)
    graphs: list[Row] = field(default_factory=list)
    coverage: list[CoverageRow] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)
    cache: list[Row] = field(default_factory=list)
    sizes: Row = field(default_factory=dict)
    kernels: list[Row] = field(default_factory=list)
    distributions: dict[str, list[Row]] = field(default_factory=dict)
    blame: Row | None = None

    @property
    def last_number(self) -> str:
        """Of the last listing, `000` where there is one only."""
        return str(self.graphs[-1]["listing"]).split("_")[0] if self.graphs else "000"

    @property
    def input_bytes(self) -> int | None:
        """Of the constants as traced; None if that graph is not here."""
        if not self.graphs or self.graphs[0]["pass"] is not None or not self.passes:
            return None
        constants = {node["operator"]: node["bytes"] or 0 for node in self.graphs[0]["new"] if node["op"] == "constant"}
        return sum(constants.values())

    def to_json(self) -> Row:
        """What the report's script reads."""
        values = {name: getattr(self, name) for name in ("title", "target", "passes", "graphs", "notes", "kernels", "distributions", "blame")}
        return values | {"coverage": [asdict(row) for row in self.coverage]}


def read_facts(directory: Path) -> Facts:
    """Dev reader."""
    load = lambda name, default: json.loads((directory / name).read_text()) if (directory / name).is_file() else default
    head = load("dump.json", {})
    kernels = load("kernels.json", [])
    for kernel in kernels:
        if kernel.get("file"):
            kernel["source"] = (directory / kernel["file"]).read_text()
    return Facts(
        head["model"], head["target"], head["pipeline"], head["complete"], load("passes.json", []),
        [json.loads(line) for line in (directory / "graphs.jsonl").open()], [CoverageRow(**r) for r in load("coverage.json", [])],
        load("notes.json", []), load("cache.json", []), load("sizes.json", {}), kernels, load("distributions.json", {}), load("blame.json", None),
    )
