"""The instrument that dumps: listens to a pipeline and writes what each pass changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qcompile.dump import products, writer
from qcompile.dump.distributions import DistributionRecorder
from qcompile.dump.facts import facts_of_dump
from qcompile.dump.graph_log import GraphLog
from qcompile.dump.html.page import write_report
from qcompile.dump.rows import listing_name
from qcompile.dump.tables import coverage_rows
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Kernel
from qcompile.ir.records import PassRecord
from qcompile.ir.text import aligned, lines
from qcompile.passes.execution import Inputs
from qcompile.runtime.artifact import ArtifactContents


class DumpInstrument:
    """Writes listings, diffs and measurements into a directory while passes run; `finish` adds what came out in the end."""

    def __init__(
        self, directory: Path, *, model: str = "", target: str = "", pipeline: str = "", inputs: Callable[[Graph], Inputs] | None = None
    ) -> None:
        """Empty the directory of an earlier dump and begin a new one, which counts as interrupted until `finish` is called.

        `inputs` makes batches for a graph, on which activations are measured around a change of basis; by default the graph's examples.

        Raises:
            SourceError: if it cannot be made.
        """
        self.directory = directory
        self._heading = {"model": model, "target": target, "pipeline": pipeline}
        self._text = ""
        self._records: list[PassRecord] = []
        self._distributions = DistributionRecorder(inputs)
        writer.prepare(directory)
        writer.write_heading(directory, self._heading, complete=False)
        self._graphs = GraphLog(directory / writer.GRAPHS_FILE)

    def before(self, name: str, graph: Graph) -> None:
        """Write the input before the first pass; later texts are kept from the pass before."""
        del name
        if not self._text:
            self._text = self._write(writer.INPUT_LISTING, None, graph)
            self._distributions.before(graph, writer.INPUT_LISTING)

    def after(self, record: PassRecord, graph: Graph) -> None:
        """Write what a pass changed, and the records so far."""
        self._records.append(record)
        if record.changed:
            before, self._text = self._text, self._write(listing_name(record), record.index, graph)
            writer.write_diff(self.directory, record, before, self._text)
            moments = self._distributions.after(graph, listing_name(record), record.spec)
            if moments is not None:
                writer.write_moments(self.directory, record, moments)
            self._distributions.before(graph, listing_name(record))
        writer.write_records(self.directory, self._records)

    def _write(self, listing: str, index: int | None, graph: Graph) -> str:
        rows = lines(graph)
        text = aligned(rows)
        (self.directory / f"{listing}.txt").write_text(text, encoding="utf-8")
        self._graphs.add(listing, index, graph, rows)
        return text

    def finish(self, contents: ArtifactContents, notes: Sequence[tuple[str, str, str, bool]], kernels: Mapping[str, Kernel]) -> None:
        """Write what came out, once code is generated; `kernels` are all that were made, those without source included."""
        directory = self.directory
        self._heading["pipeline"] = contents.pipeline
        writer.write_kernels(directory, products.kernel_rows(contents.plan, kernels), kernels)
        writer.write_json(directory / "coverage.json", coverage_rows(contents.coverage))
        writer.write_json(directory / "notes.json", products.note_rows(notes))
        writer.write_json(directory / "cache.json", products.cache_rows(contents.plan))
        writer.write_json(directory / "sizes.json", products.size_values(contents))
        writer.write_json(directory / "distributions.json", self._distributions.values())
        writer.write_records(directory, self._records)
        writer.write_heading(directory, self._heading, complete=True)
        write_report(facts_of_dump(directory), directory / writer.REPORT_FILE)
