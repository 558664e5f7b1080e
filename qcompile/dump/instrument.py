"""The instrument that dumps: listens to a pipeline and writes what each pass changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qcompile.dump import writer
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Kernel
from qcompile.ir.records import PassRecord


class DumpInstrument:
    """Writes listings and diffs into a directory while passes run; `finish` adds pipeline, records and kernels."""

    def __init__(self, directory: Path) -> None:
        """Empty the directory of an earlier dump.

        Raises:
            SourceError: if it cannot be made.
        """
        self.directory = directory
        self._text = ""
        self._records: list[PassRecord] = []
        writer.prepare(directory)

    def before(self, name: str, graph: Graph) -> None:
        """Write the input before the first pass; later texts are kept from the pass before."""
        del name
        if not self._text:
            self._text = graph.text()
            (self.directory / writer.INPUT_FILE).write_text(self._text, encoding="utf-8")

    def after(self, record: PassRecord, graph: Graph) -> None:
        """Write what a pass changed."""
        self._records.append(record)
        if record.changed:
            text = graph.text()
            writer.write_pass(self.directory, record, self._text, text)
            self._text = text

    def finish(self, pipeline: str, kernels: Mapping[str, Kernel]) -> None:
        """Write the summary and the kernels, once code is generated."""
        writer.write_summary(self.directory, pipeline, self._records, kernels)
