"""What the page is made of: the facts of a compilation in the form that its script reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qcompile.dump.facts import Facts
from qcompile.dump.reader import Listing
from qcompile.dump.tables import coverage_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Content:
    """The facts of a dump or an artifact, and what the page says of them."""

    facts: Facts

    @cached_property
    def graphs(self) -> list[Row]:
        """Listings as lines of `graphs.jsonl`: each node once, where it is first seen, then by its number."""
        return _graphs(self.facts.listings(), len(self.facts.passes))

    @property
    def last_number(self) -> str:
        """Of the last listing, `000` where there is none."""
        return str(self.graphs[-1]["listing"]).partition("_")[0] if self.graphs else "000"

    @property
    def names(self) -> frozenset[str]:
        """Of the nodes of all listings."""
        return frozenset(node["name"] for graph in self.graphs for node in graph["new"])

    @property
    def input_bytes(self) -> int | None:
        """Of the constants as traced; None if that graph is not here."""
        if not self.graphs or not self.graphs[0]["listing"].startswith("000_") or not self.facts.passes:
            return None
        constants = {node["constant"]: node["bytes"] or 0 for node in self.graphs[0]["new"] if node["op"] == "constant"}
        return int(sum(constants.values()))

    @property
    def notes(self) -> list[Row]:
        """What passes left alone; of an artifact what its coverage says."""
        facts = self.facts
        if facts.notes is not None:
            return list(facts.notes)
        return [{"pass": "", "node": row.node, "reason": row.reason, "chosen": row.chosen} for row in facts.coverage if row.reason]

    def to_json(self) -> Row:
        """What the script reads."""
        facts = self.facts
        return {
            "title": facts.model,
            "target": facts.target,
            "passes": list(facts.passes),
            "graphs": self.graphs,
            "coverage": coverage_rows(facts.coverage),
            "notes": self.notes,
            "kernels": [{**kernel, "source": facts.sources.get(kernel["name"], "")} for kernel in facts.kernels],
            "distributions": dict(facts.distributions or {}),
            "blame": facts.blame,
        }


def _graphs(listings: Sequence[Listing], last: int) -> list[Row]:
    """A listing that no pass numbers, as the only one of an artifact, gets the number of the last pass."""
    numbers: dict[int, int] = {}
    graphs = []
    for listing in listings:
        known = len(numbers)
        order = [numbers.setdefault(id(node), len(numbers)) for node in listing.nodes]
        new = [{**node, "id": number} for node, number in zip(listing.nodes, order, strict=True) if number >= known]
        name = listing.name if listing.name[:1].isdigit() else f"{last:03d}_{listing.name}"
        graphs.append({"listing": name, "new": new, "order": order})
    return graphs
