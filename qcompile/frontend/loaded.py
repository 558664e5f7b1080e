"""What every front end returns."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets


@dataclass
class Loaded:
    """A captured model: its graph, with constants as handles, and its text assets."""

    graph: Graph
    assets: Assets
