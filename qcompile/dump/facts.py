"""What is known of a compilation, read from a dump or from an artifact: one form for `inspect` and `diff`."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qcompile.dump.graph_log import node_records
from qcompile.dump.products import binary_bytes, kernel_rows
from qcompile.dump.reader import Dump, Listing
from qcompile.dump.rows import record_row
from qcompile.dump.tables import coverage_rows
from qcompile.errors import SourceError
from qcompile.ir.matmuls import matmul_text
from qcompile.ir.native import INSTRUCTION_SETS, library_parts
from qcompile.ir.records import Assets, CoverageRow, PassRecord
from qcompile.ir.text import lines
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layers import CacheLayer
from qcompile.runtime.native.processor import runs_here

SPEED_FILE, ACCURACY_FILE = "bench.json", "eval.json"
"""What `qcompile bench --json` and `qcompile eval --json` print, kept beside a compilation so that `diff` finds it."""


class Compiled(Protocol):
    """The part of a compiled model that is told about."""

    contents: ArtifactContents

    @property
    def target(self) -> object:
        """What it was compiled for."""

    @property
    def assets(self) -> Assets:
        """What the model carries beside its weights."""

    @property
    def records(self) -> list[PassRecord]:
        """What each pass did."""

    @property
    def coverage(self) -> list[CoverageRow]:
        """Format and kernel of each operator."""

    @property
    def cache_layers(self) -> list[CacheLayer]:
        """The cache of each attention."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""

    @property
    def bits_per_weight(self) -> float | None:
        """Bits stored for an element of the quantized matrices."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache of a token."""

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Bytes of cache of a sequence beside its tokens."""


@dataclass(frozen=True)
class Facts:
    """What is known of a compilation.

    Attributes:
        path: where it was read from.
        kind: "dump" or "artifact".
        model: what the user called the model.
        target: `ARCH-SCHEME[-KV]`.
        pipeline: the passes as text.
        interruption: where an interrupted compilation stopped; "" for a complete one, which alone has anything but passes.
        passes: rows of `passes.json`.
        coverage: one row per linear, embedding and attention.
        cache: the cache of each layer.
        sizes: bytes and bits by name.
        kernels: rows of `kernels.json`.
        sources: kernel name -> source, for kernels that have one.
        notes: what passes left alone; None in an artifact, whose coverage says it.
        distributions: of weights and activations; None in an artifact.
        figures: what was measured of the result: KL, perplexity, tokens per second.
        blame: what `qcompile blame` left in a dump; None where it was not asked.
        engine: what an artifact for CPUs was made for; "" where nothing says so.
        libraries: of an artifact, as `library_rows` tells of them.
        listings: makes the graphs that are known, the last of them the final one.
    """

    path: Path
    kind: str
    model: str
    target: str
    pipeline: str
    interruption: str = ""
    passes: Sequence[dict[str, Any]] = ()
    coverage: Sequence[CoverageRow] = ()
    cache: Sequence[CacheLayer] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    kernels: Sequence[dict[str, Any]] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[dict[str, Any]] | None = None
    distributions: Mapping[str, Any] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    listings: Callable[[], Sequence[Listing]] = field(default=list, repr=False)
    blame: Mapping[str, Any] | None = None
    engine: str = ""
    libraries: Sequence[Mapping[str, Any]] = ()

    @property
    def matmul(self) -> str | None:
        """How linears with quantized weights multiply, in a line."""
        return matmul_text(self.coverage, self.target)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without sources of kernels; of distributions only what tables show."""
        return {
            "kind": self.kind,
            "model": self.model,
            "target": self.target,
            "engine": self.engine or None,
            "libraries": [dict(row) for row in self.libraries],
            "pipeline": self.pipeline,
            "matmul": self.matmul,
            "complete": not self.interruption,
            **self.sizes,
            "figures": dict(self.figures),
            "passes": list(self.passes),
            "coverage": coverage_rows(self.coverage),
            "notes": None if self.notes is None else list(self.notes),
            "cache": [layer.to_dict() for layer in self.cache],
            "kernels": list(self.kernels),
            "distributions": None if self.distributions is None else distribution_rows(self.distributions),
        }


def facts_of_dump(path: Path) -> Facts:
    """Read a dump directory.

    Raises:
        SourceError: for something that is no dump, one of another format, or a damaged one.
    """
    dump = Dump.open(path)
    heading = dump.heading
    if not dump.complete:
        passes = dump.passes
        return Facts(
            path, "dump", heading.model, heading.target, heading.pipeline, dump.interruption, passes, listings=lambda: dump.listings
        )
    return Facts(
        path, "dump", heading.model, heading.target, heading.pipeline, "", dump.passes,
        rows_as(dump, "coverage.json", dump.coverage, CoverageRow), rows_as(dump, "cache.json", dump.cache, _cache_layer), dump.sizes,
        dump.kernels, {row["name"]: dump.kernel_source(row) for row in dump.kernels if row["file"] is not None}, dump.notes,
        dump.distributions, measured(path, dump.passes), lambda: dump.listings, dump.blame,
    )  # fmt: skip


def rows_as(dump: Dump, name: str, rows: Sequence[dict[str, Any]], make: Callable[..., Any]) -> list[Any]:
    """Rows of a file as objects.

    Raises:
        SourceError: for a row that does not have what they are made of.
    """
    try:
        return [make(**row) for row in rows]
    except TypeError as error:
        raise SourceError(f"{dump.path / name}: damaged: expected what a dump holds there, got {error}; write the dump anew") from None


def _cache_layer(*, bits_per_number: float, **values: Any) -> CacheLayer:
    """From a row that also has what follows from the others."""
    del bits_per_number
    return CacheLayer(**values)


def facts_of_model(model: Compiled, path: Path) -> Facts:
    """What an artifact, loaded from `path`, tells of its compilation."""
    contents = model.contents
    sizes = {
        "weight_bytes": model.weight_bytes,
        "bits_per_weight": model.bits_per_weight,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_bytes_per_sequence": model.kv_bytes_per_sequence,
        "arena_bytes": max((entry.arena_bytes for entry in contents.plan.entries.values()), default=0),
        "binary_bytes": binary_bytes(contents),
    }
    sources = {name: kernel.source for name, kernel in contents.kernels.items() if kernel.source}
    rows = [record_row(record) for record in model.records]
    return Facts(
        path, "artifact", model.assets.name or model.assets.model_type, str(model.target), contents.pipeline, "", rows, model.coverage,
        model.cache_layers, sizes, kernel_rows(contents.plan, contents.kernels), sources, figures=measured(path, rows),
        listings=lambda: [_final(contents)], engine=contents.settings.engine or "", libraries=library_rows(contents),
    )  # fmt: skip


def library_rows(contents: ArtifactContents) -> list[dict[str, Any]]:
    """The libraries of an artifact: for which machine and instruction set, how large, and whether this machine runs and built them."""
    rows = []
    for name, code in sorted(contents.binaries.items()):
        machine, instruction_set = library_parts(name)
        if machine:
            runs = machine == platform.machine() and instruction_set in INSTRUCTION_SETS and runs_here(instruction_set)
            rows.append(
                {
                    "file": name, "machine": machine, "instruction_set": instruction_set, "bytes": len(code), "runs_here": runs,
                    "built_here": name not in contents.untrusted,
                }
            )  # fmt: skip
    return rows


def _final(contents: ArtifactContents) -> Listing:
    graph = contents.graph
    return Listing("final", None, tuple(node_records(graph, lines(graph))))


def measured(path: Path, passes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is known of the result: `checked_kl` on the examples, where every pass was checked, and what `read_figures` finds."""
    totals = [row["total_kl"] for row in passes if row.get("total_kl") is not None]
    return {**({"checked_kl": float(totals[-1])} if totals else {}), **read_figures(path)}


def read_figures(path: Path) -> dict[str, float]:
    """The numbers of `bench.json` and `eval.json` in a directory, and the KL that `qcompile blame` left in a dump.

    Raises:
        SourceError: for a file that is not what those commands print.
    """
    found: dict[str, float] = {}
    for name in (SPEED_FILE, ACCURACY_FILE, "blame.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            numbers = {str(key): value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        except (OSError, ValueError, AttributeError) as error:
            raise SourceError(f"{file}: expected what a command printed with --json, got {error}; write it anew") from None
        found |= {"kl": numbers["total_kl"]} if "total_kl" in numbers else numbers if name != "blame.json" else {}
    return {key: float(value) for key, value in found.items() if key not in ("weight_bytes", "bits_per_weight", "tokens")}


def distribution_rows(distributions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far each value stands out at each stage: kind of value, name, layer, listing, max/rms, kurtosis."""
    entries = [("weight", entry) for entry in distributions["weights"]]
    entries += [(str(entry.get("kind", "activation")), entry) for entry in distributions["activations"]]
    return [
        {
            "kind": kind, "name": entry["name"], "layer": entry.get("layer"), "listing": stage["listing"],
            "max_over_rms": stage["max_over_rms"], "kurtosis": stage["kurtosis"],
        }
        for kind, entry in entries
        for stage in entry["stages"]
    ]  # fmt: skip
