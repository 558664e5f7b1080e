"""How far activations stand out, channel against channel of one token: what a change of basis is there to lower."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.collectors import channels_last
from qcompile.passes.distributions import Distribution, Moments, MomentSums, distribution
from qcompile.passes.example_run import real_tokens
from qcompile.passes.execution import Execution, Inputs
from qcompile.passes.space_channels import space_name
from qcompile.passes.spaces import Kind, find_spaces
from qcompile.passes.statistics import feature_axis
from qcompile.passes.stream import real_rows

aten = torch.ops.aten
attention = torch.ops.qcompile.attention.default
_READERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default)


@dataclass(frozen=True)
class ExampleInputs:
    """A graph's own example inputs: one small batch."""

    examples: dict[str, Tensor]

    def __len__(self) -> int:
        return 1

    def tensor(self, placeholder: str, batch: int) -> Tensor:
        """The example of a placeholder."""
        del batch
        return self.examples[placeholder]

    def real(self, batch: int) -> Tensor | None:
        """Which tokens are no padding."""
        del batch
        return real_tokens(self.examples)


def measure_moments(graph: Graph, inputs: Inputs | None = None) -> dict[str, Moments]:
    """The moments of what each linear, convolution and attention (its keys) reads, by the reader's name.

    One run over `inputs`, by default the graph's examples.
    """
    return measure_readers(graph, inputs)[0]


def measure_readers(
    graph: Graph, inputs: Inputs | None = None, watched: Collection[str] = (), *, others: bool = True
) -> tuple[dict[str, Moments], dict[str, Distribution]]:
    """As `measure_moments`, and in the same run the distribution of what the `watched` readers read, by their names.

    Without `others` only these are looked at, and the model runs no further than the last of them.
    """
    read = {node.name: value for node in graph.calls(*_READERS, attention) if isinstance(value := _measured_argument(node), fx.Node)}
    read = read if others else {reader: value for reader, value in read.items() if reader in watched}
    kept = {value.name for reader, value in read.items() if reader in watched}
    observers = {value.name: _Observer(feature_axis(value), keep=value.name in kept) for value in read.values()}
    with Execution(graph, inputs or ExampleInputs(graph.interface.examples), [], observers=observers) as execution:
        execution.observe()
    moments = {reader: observers[value.name].moments for reader, value in read.items()}
    distributions = {name: observers[name].distribution() for name in sorted(kept)}
    return moments, {reader: distributions[value.name] for reader, value in read.items() if reader in watched}


def reader_groups(graph: Graph) -> dict[str, tuple[int, list[str]]]:
    """Space -> its channels and the names of what reads it; all keys, which no linear reads, are one entry."""
    groups = {
        space_name(space): (space.size, [node.name for node in space.readers])
        for space in find_spaces(graph, Kind.PERMUTATION, blocked=True)
        if space.readers
    }
    attentions = graph.calls(attention)
    if attentions:
        groups["keys"] = int(fake_value(attentions[0].args[1]).shape[-1]), [node.name for node in attentions]
    return groups


def mean_moments(found: Sequence[Moments]) -> Moments:
    """Their averages."""
    return Moments(sum(item.peak for item in found) / len(found), sum(item.kurtosis for item in found) / len(found))


def _measured_argument(node: fx.Node) -> object:
    return node.args[1] if node.target is attention else node.args[0]


class _Observer:
    """Sums the moments of each token's channels, and keeps the tokens where all is to be known of them."""

    cost = 0

    def __init__(self, axis: int, *, keep: bool) -> None:
        self._axis, self._sums = axis, MomentSums()
        self._kept: list[Tensor] | None = [] if keep else None

    @property
    def moments(self) -> Moments:
        """Their means; NaN where no token has anything but zeros."""
        return self._sums.moments

    def distribution(self) -> Distribution:
        """Of all tokens that were kept."""
        return distribution(torch.cat(self._kept or [torch.zeros(0, 1)]), self.moments)

    def add(self, value: Any, real: Tensor | None) -> None:
        rows = real_rows(channels_last(value, self._axis), real)
        self._sums.add(rows.double())
        if self._kept is not None:
            self._kept.append(rows.clone())

    def finish(self) -> None:
        """Nothing is left to do."""
