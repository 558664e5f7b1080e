"""What a report is made of: everything a dump holds, or as much of it as an artifact does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompile.dump import products
from qcompile.dump.graph_log import node_records
from qcompile.dump.reader import Dump, Listing, is_dump
from qcompile.dump.writer import record_row
from qcompile.ir.text import lines
from qcompile.runtime.artifact import ArtifactContents, load_artifact

Row = dict[str, Any]
LAST = "last"
"""What the listing of an artifact's graph is called."""


@dataclass(frozen=True)
class Facts:
    """A compilation as JSON values, in the forms of the dump's files (`docs/dumps.md`).

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
    coverage: list[Row] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)
    cache: list[Row] = field(default_factory=list)
    sizes: Row = field(default_factory=dict)
    kernels: list[Row] = field(default_factory=list)
    distributions: dict[str, Any] = field(default_factory=dict)
    blame: Row | None = None

    @property
    def last_number(self) -> str:
        """Of the last listing, `000` where there is one only."""
        return str(self.graphs[-1]["listing"]).split("_")[0] if self.graphs else "000"

    @property
    def names(self) -> frozenset[str]:
        """Of the nodes of all listings."""
        return frozenset(node["name"] for graph in self.graphs for node in graph["new"])

    @property
    def input_bytes(self) -> int | None:
        """Of the constants as traced; None if that graph is not here."""
        if not self.graphs or self.graphs[0]["pass"] is not None or not self.passes:
            return None
        constants = {node["constant"]: node["bytes"] or 0 for node in self.graphs[0]["new"] if node["op"] == "constant"}
        return int(sum(constants.values()))

    def to_json(self) -> Row:
        """What the report's script reads."""
        names = ("title", "target", "passes", "graphs", "coverage", "notes", "kernels", "distributions", "blame")
        return {name: getattr(self, name) for name in names}


def read_facts(directory: Path) -> Facts:
    """The facts of a dump, or of an artifact: its last graph, records, coverage, cache, kernels.

    Raises:
        SourceError: for a damaged dump, or one of another version.
        ArtifactError: for a damaged artifact, or what is neither.
    """
    return dump_facts(Dump.open(directory)) if is_dump(directory) else artifact_facts(load_artifact(directory))


def dump_facts(dump: Dump) -> Facts:
    """Everything a dump holds; of an interrupted one what there is, which is records and graphs."""
    heading = dump.heading
    started = Facts(heading.model, heading.target, heading.pipeline, heading.complete, dump.passes, _graphs(dump.listings))
    if not dump.complete:
        return started
    return replace(
        started,
        coverage=dump.coverage,
        notes=dump.notes,
        cache=dump.cache,
        sizes=dump.sizes,
        kernels=[{**kernel, "source": dump.kernel_source(kernel)} for kernel in dump.kernels],
        distributions=dump.distributions,
        blame=dump.blame,
    )


def _graphs(listings: Sequence[Listing]) -> list[Row]:
    """Listings as in `graphs.jsonl`: each node once, where it is first seen."""
    known: set[int] = set()
    lines = []
    for listing in listings:
        new = [node for node in listing.nodes if node["id"] not in known]
        known.update(node["id"] for node in new)
        lines.append({"listing": listing.name, "pass": listing.index, "new": new, "order": [node["id"] for node in listing.nodes]})
    return lines


def artifact_facts(contents: ArtifactContents) -> Facts:
    """What an artifact says about itself: its only graph is the last one, and nothing is said of values."""
    nodes = [{"id": number, **node} for number, node in enumerate(node_records(contents.graph, lines(contents.graph)))]
    last = len(contents.records)
    graph = {"listing": f"{last:03d}_{LAST}", "pass": last - 1, "new": nodes, "order": list(range(len(nodes)))}
    coverage = products.coverage_rows(contents.coverage)
    return Facts(
        title=contents.assets.name or contents.assets.model_type,
        target=contents.target,
        pipeline=contents.pipeline,
        passes=[record_row(record) for record in contents.records],
        graphs=[graph],
        coverage=coverage,
        notes=[{"pass": "", "node": row["node"], "reason": row["reason"], "chosen": row["chosen"]} for row in coverage if row["reason"]],
        cache=products.cache_rows(contents.plan),
        sizes=products.size_values(contents),
        kernels=_kernels(contents, coverage),
    )


def _kernels(contents: ArtifactContents, coverage: Sequence[Row]) -> list[Row]:
    """Kernels with their sources, those of the engine's own code without; which nodes they serve is read from the coverage."""
    served: dict[str, list[str]] = {}
    for row in coverage:
        for name in row["kernel"].split(", "):
            served.setdefault(name, []).append(row["node"])
    rows = products.kernel_rows(contents.graph, contents.kernels)
    made = [{**row, "nodes": served.pop(row["name"], []), "source": contents.kernels[row["name"]].source} for row in rows]
    return made + [{"name": name, "spec": "", "nodes": nodes, "launches": [], "source": ""} for name, nodes in served.items() if name]
