"""Channels of a space against positions along an axis: what a criterion needs to turn measurements into a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from qcompile.ir.basis import Basis, Blocks
from qcompile.ir.change_basis import Place
from qcompile.ir.graph import Graph
from qcompile.passes.space_types import Member, Space, Value
from qcompile.passes.statistics import Request


def positions_of(space: Space, places: Sequence[Place], length: int) -> Tensor:
    """Which channel of the space stands at each position along an axis, int64 [length]; -1 where none does."""
    channels = torch.full((length,), -1)
    for place in places:
        first = place.block * space.block_size
        channels[place.start : place.start + space.block_size] = torch.arange(first, first + space.block_size)
    return channels


def is_flat(places: Sequence[Place]) -> bool:
    """Whether the places are alike for every index of the other axes."""
    return all(index is None for place in places for index in place.index)


def covers(value: Value, space: Space) -> bool:
    """Whether every channel of the value belongs to the space."""
    length = value.node.meta["val"].shape[value.axis]
    return isinstance(length, int) and bool((positions_of(space, value.places, length) >= 0).all())


def read_values(space: Space) -> list[Value]:
    """The values that linears, convolutions and experts read from the space as they stand, where channels lie along one axis."""
    inputs = {reader.args[0] for reader in space.readers}
    return [value for value in space.values if value.node in inputs and is_flat(value.places) and not value.places[0].contravariant]


def measured_values(space: Space) -> list[Value]:
    """What to measure the channels on: what is read from the space, or else what linears and convolutions write to it."""
    written = set(space.writers)
    return read_values(space) or [value for value in space.values if value.node in written and is_flat(value.places)]


def request_for(value: Value, kind: str, parameter: float = 0.0) -> Request:
    """A statistic of a value along the axis that lies in the space."""
    return Request(value.node.name, kind, parameter, value.axis)


def value_magnitudes(space: Space, value: Value, measured: Mapping[Request, Tensor], kind: str) -> Tensor:
    """A statistic of a value by channels of the space: [space.size]; the largest where a channel stands in several positions.

    Of a second moment [K, K] the root of the diagonal counts.
    """
    found = measured[request_for(value, kind)]
    columns = found.diagonal().sqrt() if found.dim() == 2 else found
    return _largest(columns, positions_of(space, value.places, len(columns)), space.size)


def member_magnitudes(graph: Graph, space: Space, member: Member, kind: str = "absmax") -> Tensor:
    """The largest (`absmax`) or mean (`absmean`) magnitude in a constant of what belongs to each channel: [space.size].

    Where a channel stands in several places the largest of them counts.
    """
    tensor = graph.constants[member.name].materialize().float().abs()
    result = torch.zeros(space.size)
    for place in member.places:
        picked = tensor
        for axis, index in enumerate(place.index):
            picked = picked if index is None else picked.narrow(axis, index, 1)
        run = picked.narrow(member.axis, place.start, space.block_size).movedim(member.axis, 0).reshape(space.block_size, -1)
        channels = slice(place.block * space.block_size, (place.block + 1) * space.block_size)
        result[channels] = torch.maximum(result[channels], run.mean(1) if kind == "absmean" else run.amax(1))
    return result


def block_map(space: Space, make: Callable[[Tensor], Basis], values: Tensor) -> Basis:
    """The map that `make` makes of one number per channel [space.size], block by block."""
    if space.blocks == 1:
        return make(values)
    return Blocks(tuple(make(part) for part in by_block(space, values)))


def by_block(space: Space, values: Tensor) -> Tensor:
    """One number per channel [space.size] as [blocks, block size]."""
    return values.view(space.blocks, space.block_size)


def space_name(space: Space) -> str:
    """What a space is called in notes: its first value, or its first constant."""
    return space.values[0].node.name if space.values else space.members[0].name


def read_linears(graph: Graph, space: Space) -> list[tuple[fx.Node, Value]]:
    """The linears with constant weights that read the space, each with the value that it reads."""
    values = {value.node: value for value in read_values(space)}
    linear = torch.ops.aten.linear.default
    readers = [node for node in space.readers if node.target is linear and graph.constant(node.args[1]) is not None]
    return [(node, values[node.args[0]]) for node in readers if node.args[0] in values]  # type: ignore[index]


def _largest(columns: Tensor, channels: Tensor, size: int) -> Tensor:
    known = channels >= 0
    return torch.zeros(size, dtype=columns.dtype).scatter_reduce_(0, channels[known], columns[known], "amax")
