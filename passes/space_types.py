"""What the analysis of spaces returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.ir.basis import Kind
from qcompile.ir.change_basis import Place


@dataclass(frozen=True)
class Member:
    """A constant along one axis, and where on it the blocks of the map act. `offset` is added to a gain before it is one."""

    name: str
    axis: int
    places: tuple[Place, ...]
    offset: float = 0.0

    @property
    def contravariant(self) -> bool:
        """Whether it only reads the space: `T⁻ᵀ` acts on it."""
        return all(place.contravariant for place in self.places)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that lives in the space along one axis, and where on it the blocks stand."""

    node: fx.Node
    axis: int
    places: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Space:
    """Axes that change their basis together.

    Attributes:
        kind: what maps it admits (or would, if it were not blocked).
        blocks: the map is block diagonal of so many blocks …
        block_size: … of this size.
        members: the constants that absorb a change.
        values: the activations that it changes.
        readers: linears, convolutions and experts that read from it.
        writers: those and embeddings that write to it.
        blockers: (node, reason) of everything that stands in the way; empty if it is free.
    """

    kind: Kind
    blocks: int
    block_size: int
    members: tuple[Member, ...]
    values: tuple[Value, ...]
    readers: tuple[fx.Node, ...]
    writers: tuple[fx.Node, ...]
    blockers: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        """Channels of all blocks."""
        return self.blocks * self.block_size

    @property
    def blocked(self) -> tuple[str, str] | None:
        """The first node in the way, and why; None if the space is free."""
        return self.blockers[0] if self.blockers else None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its values, readers and writers."""
        return (*(value.node for value in self.values), *self.readers, *self.writers)
