"""What the tables of a report show: rows of text and of lengths, made of what a dump or an artifact holds."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from qcompile.dump.tables import format_bytes, group_coverage
from qcompile.ir.records import CoverageRow
from qcompile.runtime.cache_layers import CacheLayer, folded

WIDTH = 1000
"""Units across a bar's drawing."""
_NUMBERED = re.compile(r"^(\w+?)_\d+: ")
"""A node that a reason begins with, the number apart: `gated_activation_3: …`."""
_LEAST = 4
"""Units of the shortest bar: a pass that took no time is still somewhere."""


@dataclass(frozen=True)
class PassRow:
    """One line of the timeline; `start`, `width` and `share` are in units of `WIDTH`."""

    number: str
    name: str
    spec: str
    changed: bool
    lossy: bool
    time: str
    nodes: str
    delta: str
    bytes: str
    effect: str
    start: int = 0
    width: int = 0
    share: int = 0


def pass_rows(records: Sequence[Mapping[str, Any]], input_bytes: int | None = None) -> list[PassRow]:
    """The input, then one line per pass. `records` are rows of `passes.json`; `input_bytes` those of the constants as traced."""
    if not records:
        return []
    total = sum(record["seconds"] for record in records) or 1.0
    most = max([record["bytes"] for record in records] + [input_bytes or 0]) or 1
    share = round(WIDTH * (input_bytes or 0) / most)
    first = "" if input_bytes is None else format_bytes(input_bytes)
    rows = [PassRow("000", "input", "the graph as traced", True, False, "", f"{records[0]['nodes_before']:,}", "", first, "", share=share)]
    elapsed = 0.0
    for record in records:
        start = min(round(WIDTH * elapsed / total), WIDTH - _LEAST)
        width = min(max(_LEAST, round(WIDTH * record["seconds"] / total)), WIDTH - start)
        rows.append(_pass_row(record, start, width, round(WIDTH * record["bytes"] / most)))
        elapsed += record["seconds"]
    return rows


def _pass_row(record: Mapping[str, Any], start: int, width: int, share: int) -> PassRow:
    difference = record["nodes_after"] - record["nodes_before"]
    return PassRow(
        number=f"{record['index'] + 1:03d}",
        name=record["name"],
        spec=record["spec"],
        changed=record["changed"],
        lossy=record["changed"] and record.get("exact") is False,
        time=seconds(record["seconds"]),
        nodes=f"{record['nodes_after']:,}",
        delta=f"{difference:+,}".replace("-", "\N{MINUS SIGN}") if difference else "",
        bytes=format_bytes(record["bytes"]),
        effect=effect(record),
        start=start,
        width=width,
        share=share,
    )


def effect(record: Mapping[str, Any]) -> str:
    """What a pass did to the model's output, where that was measured: `exact to 3e-15`, `SQNR 14.2 dB, KL 0.342`, `max error 0.79`."""
    if not record["changed"]:
        return ""
    measures = {"SQNR {:.1f} dB": record.get("sqnr_db"), "KL {:.3g}": record.get("kl")}
    parts = [text.format(value) for text, value in measures.items() if value is not None]
    error = record.get("max_error")
    if record.get("exact"):
        return "" if error is None else f"exact to {error:.1g}" if error else "exact, bit for bit"
    if not parts and error is not None:
        parts = [f"max error {error:.2g}"]
    return ", ".join(parts) or ("not measured" if record.get("exact") is False else "")


def time_axis(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How long the timeline is."""
    return {"total": seconds(sum(record["seconds"] for record in records))}


def seconds(value: float) -> str:
    """`0.02 s`, `12.3 s`, `4 min 05 s`."""
    if value < 10:
        return f"{value:.2f} s"
    return f"{value:.1f} s" if value < 120 else f"{int(value) // 60} min {int(value) % 60:02d} s"


@dataclass(frozen=True)
class Member:
    """A node or kernel in a list, and where the report shows it; "" for what has no place there, such as a space."""

    title: str
    href: str


@dataclass(frozen=True)
class CoverageGroup:
    """Operators that were treated alike, by one kernel for each number of rows."""

    operator: str
    format: str
    kernels: list[Member]
    reason: str
    chosen: bool
    members: list[Member]


def coverage_groups(rows: Sequence[CoverageRow], number: str = "", kernels: Iterable[str] = ()) -> list[CoverageGroup]:
    """Coverage as the terminal groups it; `number` is the listing that nodes are shown in, `kernels` those that have a place there."""
    known = set(kernels)
    groups = []
    for (operator, form, kernel, reason), alike in group_coverage(rows).items():
        members = [Member(row.weight or row.node, node_link(row.node, number)) for row in alike]
        served = [Member(name, f"#kernel/{quote(name, safe='')}" if name in known else "") for name in kernel.split(", ")]
        groups.append(CoverageGroup(operator, form, served, reason, alike[0].chosen, members))
    return groups


@dataclass(frozen=True)
class NoteGroup:
    """Nodes that one pass left alone for one reason."""

    step: str
    reason: str
    chosen: bool
    members: list[Member]


def note_groups(notes: Sequence[Mapping[str, Any]], number: str, nodes: Container[str]) -> list[NoteGroup]:
    """Notes by pass and reason, those that nobody chose first; reasons that differ in the number of a node they begin with are one.

    `nodes` are the names that the report has a place for, `number` the listing that they are shown in.
    """
    groups: dict[tuple[str, str, bool], list[Member]] = {}
    for note in notes:
        name, reason = note["node"], _NUMBERED.sub(r"\1: ", note["reason"])
        key = (note["pass"], reason, bool(note["chosen"]))
        groups.setdefault(key, []).append(Member(name, node_link(name, number) if name in nodes else ""))
    made = [NoteGroup(name, reason, chosen, members) for (name, reason, chosen), members in groups.items()]
    return sorted(made, key=lambda group: group.chosen)


def node_link(name: str, number: str) -> str:
    """The address of a node in a listing, inside the report."""
    return f"#node/{quote(name, safe='')}@{number}"


def cache_rows(layers: Sequence[CacheLayer]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Runs of layers whose caches are alike, and sums."""
    rows = [{**layer.to_dict(), "layers": name} for name, layer in folded(layers)]
    sums = {"token": "bytes_per_token", "sequence": "bytes_per_sequence", "tables": "table_bytes"}
    return rows, {"count": len(layers)} | {name: sum(getattr(layer, key) for layer in layers) for name, key in sums.items()}


def size_rows(sizes: Mapping[str, Any]) -> dict[str, str]:
    """Sizes in words: bytes with a unit, other floats with four significant digits."""
    return {" ".join(word for word in key.split("_") if word != "bytes"): _size(key, value) for key, value in sizes.items()}


def _size(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if "bytes" in key:
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def caption(records: Sequence[Mapping[str, Any]]) -> str:
    """One sentence under the timeline: how errors were measured, or how to have them measured."""
    if any(record.get("max_error") is not None for record in records):
        return (
            "The last column compares the model's output before and after a pass on a small batch: exact passes in float64, by the largest "
            "difference over the largest output; others by signal to quantization noise and by KL divergence where they were measured."
        )
    return "Nothing was compared while this was compiled; with --check every pass is held to what it claims and its effect recorded."
