"""Where one node comes from and what became of it: source line, traced operators, passes, kernel; of a constant, what was done to it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from qcompile.dump.facts import Facts
from qcompile.dump.reader import Listing, Node
from qcompile.dump.tables import format_bytes, kernel_table
from qcompile.errors import SourceError

_SUGGESTIONS = 3
_MOST_NAMES = 12


def provenance(facts: Facts, name: str) -> dict[str, Any]:
    """The chain of a node or constant, as JSON values.

    Returns:
        `node`: its record in the last listing that has it; `listing`: that listing; `readers`: what reads it there; `kernels`: rows of
        the kernels that run it, or, for a constant, what reads it; `life`: in which listings it was made, changed or gone, and what came
        in its place.

    Raises:
        SourceError: if no listing has it, naming close ones.
    """
    listings = list(facts.listings())
    listing, node = _find(facts, listings, name)
    readers = _readers(listing, node)
    run = {node["name"], *(readers if node["constant"] is not None else ())}
    return {
        "listing": listing.name,
        "node": node,
        "readers": readers,
        "kernels": [row for row in facts.kernels if run & set(row["nodes"])],
        "life": _life(listings, node["name"]),
    }


def _find(facts: Facts, listings: Sequence[Listing], name: str) -> tuple[Listing, Node]:
    """The node or constant called `name` in the last listing that has one."""
    wanted = name.removeprefix("%")
    for listing in reversed(listings):
        for node in listing.nodes:
            if wanted in (node["name"], node["constant"]):
                return listing, node
    known = dict.fromkeys(
        str(label) for listing in reversed(listings) for node in listing.nodes for label in (node["name"], node["constant"])
    )
    close = difflib.get_close_matches(wanted, known, _SUGGESTIONS, cutoff=0.5)
    remedy = f"did you mean {', '.join(close)}?" if close else "name one as the listing shows it"
    raise SourceError(f"{facts.path}: expected a node or constant of the graph, got {name!r}; {remedy}")


def _readers(listing: Listing, node: Node) -> list[str]:
    """What reads a node, through calls that only unpack constants."""
    readers = [other for other in listing.nodes if node["name"] in other["inputs"]]
    if node["constant"] is None:
        return [reader["name"] for reader in readers]
    found: dict[str, None] = {}
    for reader in readers:
        unpacks = reader["operator"] in ("dequantize", "aten.reshape")
        further = [other["name"] for other in listing.nodes if reader["name"] in other["inputs"]] if unpacks else []
        found.update(dict.fromkeys(further or [reader["name"]]))
    return list(found)


def _life(listings: Sequence[Listing], name: str) -> list[dict[str, Any]]:
    """`made`, `changed` and `gone`, each with its listing; with `gone`, the new nodes that share a traced operator with it."""
    life: list[dict[str, Any]] = []
    before: Node | None = None
    for place, listing in enumerate(listings):
        node = listing.node(name)
        if node is not None and node is not before:
            life.append({"listing": listing.name, "what": "made" if before is None else "changed", "successors": []})
        elif node is None and before is not None:
            known = {item["name"] for item in listings[place - 1].nodes}
            heirs = [item["name"] for item in listing.nodes if item["name"] not in known and set(item["origins"]) & set(before["origins"])]
            life.append({"listing": listing.name, "what": "gone", "successors": heirs[:_MOST_NAMES]})
        before = node
    return life


def provenance_tables(found: dict[str, Any]) -> list[RenderableType]:
    """The chain as tables: the node, its kernels, its life."""
    node = found["node"]
    values = {
        "node": node["name"],
        "constant": node["constant"] or "",
        "as listed": node["call"],
        "type": f"{node['type']} {node['format']}".strip(),
        "bytes": "" if node["bytes"] is None else format_bytes(node["bytes"]),
        "layer": "" if node["layer"] is None else node["layer"],
        "source line": node["source"],
        "traced operators": "\n".join(node["origins"]),
        "passes": " > ".join(node["passes"]),
        "what was done to it": "\n".join(node["log"]),
        "reads": _some(node["inputs"]),
        "read by": _some(found["readers"]),
        "kernels": "\n".join(row["name"] for row in found["kernels"]),
    }
    table = Table(title=found["listing"], title_justify="left", show_header=False)
    table.add_column("name")
    table.add_column("value", overflow="fold")
    for key, value in values.items():
        if value != "":
            table.add_row(key, escape(str(value)))
    tables: list[RenderableType] = [table]
    launched = [row for row in found["kernels"] if row["launches"]]
    return [*tables, *([kernel_table(launched)] if launched else []), *([_life_table(found["life"])] if len(found["life"]) > 1 else [])]


def _some(names: Sequence[str]) -> str:
    more = f", … {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _life_table(life: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="what became of it", title_justify="left")
    for header in ("listing", "what", "in its place"):
        table.add_column(header, overflow="fold")
    for row in life:
        table.add_row(row["listing"], row["what"], ", ".join(row["successors"]))
    return table
