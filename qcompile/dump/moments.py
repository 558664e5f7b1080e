"""What a change of basis did to the activations: one table per pass that made one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from rich.table import Table

from qcompile.ir.change_basis import ChangeBasis
from qcompile.ir.graph import Graph
from qcompile.passes.distributions import Distribution, Moments
from qcompile.passes.execution import Inputs
from qcompile.passes.moments import mean_moments, measure_readers, reader_groups

Measured = tuple[dict[str, Moments], dict[str, Distribution]]


class MomentsRecorder:
    """Measures what is read from each space before and after every pass that changed a basis, whatever the pass is called.

    It recognises one by its traces: new entries in the logs of constants, and new online transforms.
    """

    def __init__(self, inputs: Callable[[Graph], Inputs] | None = None) -> None:
        """Measure on what `inputs` makes of a graph, such as calibration batches; by default on the graph's examples."""
        self._inputs = inputs
        self._before: Graph | None = None
        self._known: Measured = ({}, {})
        self._seen: tuple[str, frozenset[str], bool] = ("", frozenset(), False)
        self.watched: frozenset[str] = frozenset()

    @property
    def previous(self) -> Graph | None:
        """The graph before the pass that runs."""
        return self._before

    def before(self, graph: Graph) -> None:
        """Remember the graph: constants are handles, so a copy costs little."""
        self._before = graph.clone()

    def after(self, graph: Graph, title: str) -> Table | None:
        """The table of what changed, or None if no basis did."""
        before, self._before = self._before, None
        if before is None or not Counter(basis_changes(graph)) - Counter(basis_changes(before)):
            return None
        return moments_table(reader_groups(before), self.measure(before)[0], self.measure(graph)[0], title)

    def measure(self, graph: Graph, only: frozenset[str] | None = None) -> Measured:
        """The moments of what each reader reads, and distributions for the `watched` ones; of nothing but `only` where that is given.

        What one pass leaves is what the next one starts from: it is not measured twice.
        """
        key, watched = graph.fingerprint(), self.watched if only is None else only
        known, seen, all_seen = self._seen
        if key != known or not watched <= seen or (only is None and not all_seen):
            inputs = None if self._inputs is None else self._inputs(graph)
            self._known = measure_readers(graph, inputs, watched, others=only is None)
            self._seen = key, watched, only is None
        return self._known


def basis_changes(graph: Graph) -> list[str]:
    """Every change of basis in the graph as text, in a fixed order."""
    logged = [
        f"{name}: {transform}"
        for name, constant in graph.constants.items()
        for transform in constant.transforms
        if isinstance(transform, ChangeBasis)
    ]
    online = [f"{node.name}: {node.args}" for node in graph.calls(torch.ops.qcompile.hadamard.default)]
    return sorted(logged) + sorted(online)


def moments_table(
    groups: Mapping[str, tuple[int, list[str]]], before: Mapping[str, Moments], after: Mapping[str, Moments], title: str
) -> Table:
    """One line per space: channels, how many operators read it, and max/rms and kurtosis of what they read, before and after."""
    table = Table(title=title, title_justify="left")
    table.add_column("space", overflow="fold")
    for header in ("channels", "readers", "max/rms before", "after", "kurtosis before", "after"):
        table.add_column(header, justify="right")
    for name, (size, readers) in groups.items():
        known = [reader for reader in readers if reader in before and reader in after]
        if known:
            old, new = (mean_moments([found[reader] for reader in known]) for found in (before, after))
            numbers = (old.peak, new.peak, old.kurtosis, new.kurtosis)
            table.add_row(name, str(size), str(len(known)), *(f"{number:.3g}" for number in numbers))
    return table
