"""What `compiled.report()` returns: text in a terminal, tables in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from qcompile.dump.cache_table import cache_tables
from qcompile.dump.html import views
from qcompile.dump.html.page import asset, environment
from qcompile.dump.rows import record_row
from qcompile.dump.tables import coverage_table, format_bytes, pass_table, readable, value_table, written
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layers import CONTEXT, cache_layers


class Report(str):
    """A report as text; notebooks show the same facts as HTML."""

    __slots__ = ("html",)

    html: str

    def __new__(cls, text: str, html: str) -> Report:
        """The text, and what a notebook shows in its place."""
        made = super().__new__(cls, text)
        made.html = html
        return made

    def _repr_html_(self) -> str:
        """For Jupyter: tables without script."""
        return self.html


def make_report(contents: ArtifactContents, sizes: Mapping[str, Any]) -> Report:
    """Passes, coverage, cache, `sizes` and the pipeline of a compiled model."""
    tables = [pass_table(contents.records), coverage_table(contents.coverage), *cache_tables(cache_layers(contents.plan))]
    return Report(written([*tables, value_table(readable(sizes)), contents.pipeline]), report_html(contents, sizes))


def report_html(contents: ArtifactContents, sizes: Mapping[str, Any]) -> str:
    """The same as HTML: a fragment with its own style."""
    records = [record_row(record) for record in contents.records]
    rows, sums = views.cache_rows(cache_layers(contents.plan))
    context = {
        "style": Markup(asset("notebook.css")),
        "facts": _headline(contents, sizes),
        "passes": views.pass_rows(records),
        "axis": views.time_axis(records),
        "coverage": views.coverage_groups(contents.coverage),
        "cache": rows,
        "cache_sums": sums,
        "context": CONTEXT,
        "sizes": views.size_rows(sizes),
        "pipeline": contents.pipeline,
    }
    return environment().get_template("notebook.html").render(context)


def _headline(contents: ArtifactContents, sizes: Mapping[str, Any]) -> dict[str, str]:
    """The few figures that stand first."""
    bits = sizes.get("bits_per_weight")
    left = sum(bool(row.reason) for row in contents.coverage)
    return {
        "target": contents.target,
        "of weights": format_bytes(contents.weight_bytes),
        **({} if bits is None else {"bits per weight": f"{bits:.2f}"}),
        "operators left alone": str(left),
    }
