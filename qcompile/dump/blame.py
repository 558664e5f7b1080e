"""What of a compiled model's loss each quantizer causes: as JSON, as a table, and as a heat map of layers and kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.dump.facts import facts_of_dump
from qcompile.dump.html.page import write_report
from qcompile.dump.reader import Dump
from qcompile.dump.tables import value_table, written
from qcompile.dump.writer import REPORT_FILE
from qcompile.errors import SourceError

FILE = "blame.json"
KL, NOISE = "KL in nats per token", "noise over signal"
"""What the distance of a language model is in, and that of any other module."""
_HEAT = ("#fff7ec", "#fee8c8", "#fdd49e", "#fdbb84", "#fc8d59", "#e34a33", "#b30000")
"""From little to most, OrRd of ColorBrewer: a sequence that survives a greyscale print."""
_LIGHT_TEXT = 5
"""From this colour on text is white."""


@dataclass(frozen=True)
class Cell:
    """One quantizer, or a group of them that was not looked into.

    Attributes:
        layer: the repeated layer it belongs to; None for none, or several.
        kind: `weights`, `activations` or `cache`.
        step: the pass that put it there.
        node: the weight, or the node that quantizes or attends, as a listing names it; "" for a group.
        group: for people: the module, or what the group holds.
        off: the loss that vanishes when only this is switched off.
        alone: the loss there is when only this is on.
        layers: of each of its quantizers.
    """

    layer: int | None
    kind: str
    step: str
    node: str
    group: str
    off: float
    alone: float
    layers: tuple[int | None, ...] = ()

    @property
    def share(self) -> float:
        """The mean of `off` and `alone`: where the loss is quadratic in the errors, these add up to the whole."""
        return (self.off + self.alone) / 2

    @property
    def label(self) -> str:
        """The node and what it rounds, or what the group holds."""
        return self.group if not self.node else self.node if self.node.startswith(self.group) else f"{self.node}: {self.group}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a cell has a `node` or is a `group`."""
        place = {"node": self.node, "name": self.group} if self.node else {"group": self.group}
        return {
            "layer": self.layer, "kind": self.kind, "pass": self.step, **place, "off": self.off, "alone": self.alone, "share": self.share,
            "quantizers": len(self.layers),
        }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A pass without quantizers to switch.

    Attributes:
        name: of the pass.
        added: the loss behind it, less that before it.
        is_exact: whether it claims to preserve the function.
        node: the first that is wrong behind an exact pass; "" where none was found.
        place: the same for people, with the source line, the constants that come into question and the values.
    """

    name: str
    added: float
    is_exact: bool
    node: str = ""
    place: str = ""


@dataclass(frozen=True)
class Blame:
    """What each quantizer and pass of a compiled model adds to its distance from the model that it was made from.

    Attributes:
        model: its name.
        target: what it was compiled for.
        unit: of the distance: KL in nats per token, or noise over signal for a plain module.
        total: the distance of the compiled model.
        cells: quantizers and groups that together are all, the largest share first.
        steps: passes that have no quantizers and change the distance all the same, in order.
        floor: the distance with every quantizer off.
        quantizers: how many there are.
        evaluations: runs of the model, the reference's own not counted.
        budget: how many were allowed, those for `steps` not counted.
        tokens: or samples, that it was run on.
    """

    model: str
    target: str
    unit: str
    total: float
    cells: tuple[Cell, ...]
    steps: tuple[Step, ...]
    floor: float
    quantizers: int
    evaluations: int
    budget: int
    tokens: int

    @property
    def remainder(self) -> float:
        """What shares and steps leave of the total: errors that do not act as a quadratic form says."""
        return self.total - sum(cell.share for cell in self.cells) - sum(step.added for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the content of `blame.json`."""
        return {
            "format": 1, "model": self.model, "target": self.target, "unit": self.unit, "total_kl": self.total, "floor": self.floor,
            "off_sum": sum(cell.off for cell in self.cells), "alone_sum": sum(cell.alone for cell in self.cells),
            "share_sum": sum(cell.share for cell in self.cells), "remainder": self.remainder, "quantizers": self.quantizers,
            "evaluations": self.evaluations, "budget": self.budget, "tokens": self.tokens,
            "cells": [cell.to_dict() for cell in self.cells],
            "passes": [
                {"pass": step.name, "added": step.added, "exact": step.is_exact, "node": step.node, "place": step.place}
                for step in self.steps
            ],
        }  # fmt: skip

    def write(self, directory: Path) -> Path:
        """Put `blame.json` into a dump, and the figures into its report if it has one; returns the path of the former.

        Raises:
            SourceError: if there is no dump, or it cannot be written.
        """
        require_dump(directory)
        path, report = directory / FILE, directory / REPORT_FILE
        try:
            path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise SourceError(f"{path}: expected a file that can be written, got {error.strerror}; choose another directory") from None
        if report.is_file():
            write_report(facts_of_dump(directory), report)
        return path

    def tables(self, most: int = 10) -> list[RenderableType]:
        """The largest shares, the heat map, passes without quantizers where any adds to the loss, and the sums."""
        found: list[RenderableType] = [share_table(self, most), heat_map(self)]
        if self.steps:
            found.append(_step_table(self.steps))
        return [*found, value_table(self._sums())]

    def __str__(self) -> str:
        return written(self.tables())

    def _sums(self) -> dict[str, object]:
        off, alone, share = (sum(values) for values in zip(*((cell.off, cell.alone, cell.share) for cell in self.cells), strict=True))
        seen = f"{self.tokens} {'tokens' if self.unit == KL else 'samples'}"
        decibels = {"SQNR": f"{-10 * math.log10(self.total):.1f} dB"} if self.unit == NOISE and self.total > 0 else {}
        return {
            f"total ({self.unit})": self.total,
            **decibels,
            "sum of shares": f"{share:.4g} ({_percent(share, self.total)})",
            "sum of switched off": f"{off:.4g} ({_percent(off, self.total)})",
            "sum of alone": f"{alone:.4g} ({_percent(alone, self.total)})",
            "remainder": f"{self.remainder:.4g} ({_percent(self.remainder, self.total)})",
            "quantizers": f"{self.quantizers} in {len(self.cells)} groups",
            "evaluations": f"{self.evaluations} of at most {self.budget}, on {seen} each",
        }


def require_dump(directory: Path) -> None:
    """Refuse a directory that is no dump.

    Raises:
        SourceError: saying what it is instead.
    """
    Dump.open(directory)


def share_table(blame: Blame, most: int = 10) -> Table:
    """The cells of largest share, one a line."""
    table = Table(title=f"{blame.model} for {blame.target}: where its {blame.unit} comes from", title_justify="left")
    table.add_column("layer", justify="right")
    for header in ("kind", "pass", "node or group"):
        table.add_column(header, overflow="fold")
    for header in ("off", "alone", "share"):
        table.add_column(header, justify="right")
    for cell in blame.cells[:most]:
        numbers = (f"{cell.off:.3g}", f"{cell.alone:.3g}", _percent(cell.share, blame.total))
        layer = "" if cell.layer is None else str(cell.layer)
        table.add_row(layer, cell.kind, cell.step, Text(cell.label), *numbers)
    left = len(blame.cells) - most
    if left > 0:
        table.add_row("", "", "", f"and {left} more", "", "", _percent(sum(cell.share for cell in blame.cells[most:]), blame.total))
    return table


def heat_map(blame: Blame) -> Table:
    """Share of the loss by layer (down) and kind and pass (across); a group's is spread evenly over its quantizers."""
    shares = heat(blame.cells)
    columns = list(dict.fromkeys((cell.kind, cell.step) for cell in blame.cells))
    layers = sorted({layer for layer, *_ in shares}, key=lambda layer: (layer is None, layer or 0))
    largest = max((abs(share) for share in shares.values()), default=0.0)
    table = Table(title="share by layer", title_justify="left")
    table.add_column("layer", justify="right")
    for kind, step in columns:
        table.add_column(f"{kind}\n{step}", justify="right")
    for layer in layers:
        found = [shares.get((layer, *column)) for column in columns]
        table.add_row("others" if layer is None else str(layer), *(_warm(share, largest, blame.total) for share in found))
    return table


def heat(cells: Sequence[Cell]) -> Mapping[tuple[int | None, str, str], float]:
    """Layer, kind and pass -> share."""
    shares: dict[tuple[int | None, str, str], float] = {}
    for cell in cells:
        for layer in cell.layers or (cell.layer,):
            place = (layer, cell.kind, cell.step)
            shares[place] = shares.get(place, 0.0) + cell.share / max(1, len(cell.layers))
    return shares


def _warm(share: float | None, largest: float, total: float) -> Text:
    if share is None:
        return Text("")
    step = round((len(_HEAT) - 1) * max(0.0, share) / largest) if largest else 0
    return Text(f" {_percent(share, total)} ", style=f"{'white' if step >= _LIGHT_TEXT else 'black'} on {_HEAT[step]}")


def _step_table(steps: Sequence[Step]) -> Table:
    table = Table(title="passes without quantizers", title_justify="left")
    table.add_column("pass")
    table.add_column("adds", justify="right")
    table.add_column("claims to be exact")
    table.add_column("where it goes wrong", overflow="fold")
    for step in steps:
        table.add_row(step.name, f"{step.added:.3g}", "yes" if step.is_exact else "no", Text(step.place))
    return table


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
