"""The report: one HTML file that needs nothing else, no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qcompile.dump.facts import Facts
from qcompile.dump.html import views
from qcompile.dump.html.content import Content
from qcompile.dump.tables import format_bytes
from qcompile.errors import SourceError
from qcompile.runtime.cache_layers import CONTEXT

SCRIPTS = (
    "model", "dom", "layers", "alignment", "marks", "graph", "diff", "charts", "inspector", "kernels", "distributions", "sensitivity",
    "search", "main",
)  # fmt: skip
"""Parts of the script, in the order in which they are joined."""


def write_report(facts: Facts, path: Path) -> int:
    """Write the report of a dump or an artifact; returns its size in bytes.

    Raises:
        SourceError: if `path` cannot be written.
    """
    text = render(Content(facts)).encode()
    try:
        path.write_bytes(text)
    except OSError as error:
        raise SourceError(f"report {path}: expected a file that can be written, got {error.strerror}; choose another") from None
    return len(text)


def render(content: Content) -> str:
    """The whole page. Everything from the model is escaped, and the page's own policy lets nothing run or load but what is in it."""
    facts = content.facts
    script, style = script_text(), asset("report.css")
    rows, sums = views.cache_rows(facts.cache)
    number = content.last_number
    context = {
        "title": facts.model,
        "target": facts.target,
        "interruption": facts.interruption,
        "pipeline": facts.pipeline,
        "views": _views(content),
        "tiles": _tiles(content),
        "passes": views.pass_rows(facts.passes, content.input_bytes),
        "axis": views.time_axis(facts.passes),
        "caption": views.caption(facts.passes),
        "coverage": views.coverage_groups(facts.coverage, number, [kernel["name"] for kernel in facts.kernels]),
        "notes": views.note_groups(content.notes, number, content.names),
        "cache": rows,
        "cache_sums": sums,
        "context": CONTEXT,
        "sizes": views.size_rows({**facts.sizes, **facts.figures}),
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": _digest(style),
        "script_hash": _digest(script),
        "data": packed(content.to_json()),
    }
    return environment().get_template("report.html").render(context)


@cache
def environment() -> Environment:
    """Templates of this package; values are escaped, and a name that is missing is an error."""
    made = Environment(
        loader=PackageLoader("qcompile.dump.html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["bytes"] = format_bytes
    return made


def asset(name: str) -> str:
    """A file of `assets/`."""
    return resources.files("qcompile.dump.html").joinpath("assets", name).read_text(encoding="utf-8")


def script_text() -> str:
    """All parts of the script, in a scope of their own."""
    parts = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


def packed(value: Any) -> str:
    """JSON, deflated, in base64: what `DecompressionStream` reads."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def _digest(text: str) -> str:
    """As a content security policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _views(content: Content) -> list[tuple[str, str, str]]:
    """Address, label and a count for each tab."""
    facts, graphs = content.facts, content.graphs
    distributions = sum(len(items) for items in (facts.distributions or {}).values())
    return [
        ("pipeline", "Pipeline", str(len(facts.passes))),
        ("graph", "Graph", f"{len(graphs[-1]['order']):,}" if graphs else ""),
        ("diff", "Diff", ""),
        ("distributions", "Distributions", str(distributions or "")),
        ("sensitivity", "Sensitivity", ""),
        ("coverage", "Coverage", str(len(facts.coverage) or "")),
        ("kernels", "Kernels", str(len(facts.kernels) or "")),
        ("memory", "Memory", ""),
    ]


def _tiles(content: Content) -> list[dict[str, str]]:
    """The figures at the top; only those that are known."""
    facts, before = content.facts, content.input_bytes
    records, sizes = facts.passes, facts.sizes
    changed = sum(record["changed"] for record in records)
    left = [row for row in facts.coverage if row.reason]
    refused = sum(not row.chosen for row in left)
    tiles = [
        _tile("weights", format_bytes(sizes["weight_bytes"]) if "weight_bytes" in sizes else "", before and format_bytes(before)),
        _tile("bits per weight", _number(sizes.get("bits_per_weight"), "{:.2f}"), note="of quantized matrices"),
        _tile("nodes", f"{records[-1]['nodes_after']:,}" if records else "", records and f"{records[0]['nodes_before']:,}"),
        _tile("passes", str(len(records) or ""), note=f"{changed} changed something"),
        _tile("operators covered", f"{len(facts.coverage) - len(left)} of {len(facts.coverage)}" if facts.coverage else "",
              note=f"{len(left) - refused} by choice" + (f", {refused} not possible" if refused else "")),
        _tile("KL from float", _number(facts.figures.get("kl"), "{:.3g}"), note="nats at the output"),
    ]  # fmt: skip
    return [tile for tile in tiles if tile["value"]]


def _tile(name: str, value: str, before: str | Any = "", note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "before": before if before and before != value else "", "note": note}


def _number(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)
