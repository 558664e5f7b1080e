"""The instrument that dumps: listens to a pipeline and writes what each pass changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qcompile.dump import writer
from qcompile.dump.moments import MomentsRecorder
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Kernel
from qcompile.ir.records import PassRecord
from qcompile.passes.execution import Inputs


class DumpInstrument:
    """Writes listings and diffs into a directory while passes run; `finish` adds pipeline, records and kernels."""

    def __init__(self, directory: Path, inputs: Callable[[Graph], Inputs] | None = None) -> None:
        """Empty the directory of an earlier dump.

        `inputs` makes batches for a graph, on which spaces are measured around a change of basis; by default the graph's examples.

        Raises:
            SourceError: if it cannot be made.
        """
        self.directory = directory
        self._text = ""
        self._records: list[PassRecord] = []
        self._moments = MomentsRecorder(inputs)
        writer.prepare(directory)

    def before(self, name: str, graph: Graph) -> None:
        """Write the input before the first pass; later texts are kept from the pass before."""
        del name
        if not self._text:
            self._text = graph.text()
            (self.directory / writer.INPUT_FILE).write_text(self._text, encoding="utf-8")
        self._moments.before(graph)

    def after(self, record: PassRecord, graph: Graph) -> None:
        """Write what a pass changed."""
        self._records.append(record)
        if record.changed:
            text = graph.text()
            writer.write_pass(self.directory, record, self._text, text)
            self._text = text
            moments = self._moments.after(graph, record.spec)
            if moments is not None:
                writer.write_moments(self.directory, record, moments)

    def finish(self, pipeline: str, kernels: Mapping[str, Kernel]) -> None:
        """Write the summary and the kernels, once code is generated."""
        writer.write_summary(self.directory, pipeline, self._records, kernels)
