"""The entry that a change of basis leaves in a constant's log."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.ir.basis import Basis, Blocks, compose
from qcompile.ir.constants import Cast, Constant, Transform, uncast


@dataclass(frozen=True)
class Place:
    """Where one block of a map acts on a constant.

    Attributes:
        index: for each axis of the constant an index, or None for all of it (and for the changed axis).
        start: the first channel along the changed axis.
        block: which block of the map acts there.
        contravariant: whether as `T⁻ᵀ`.
    """

    index: tuple[int | None, ...]
    start: int
    block: int = 0
    contravariant: bool = False


@dataclass(frozen=True)
class ChangeBasis:
    """`T` along `axis`: everywhere, or block by block at `places`. The result is at least float32; arithmetic is in float64.

    `offset` is added before and taken away after: Gemma's gain is `1 + w`, and it is the gain that changes its basis.
    """

    axis: int
    basis: Basis
    contravariant: bool = False
    places: tuple[Place, ...] = ()
    offset: float = 0.0

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(dtype, torch.float32)

    def apply(self, tensor: Tensor) -> Tensor:
        """Map the channels.

        Raises:
            PassError: if a block has another size than the map says.
        """
        if self.offset:
            shifted = replace(self, offset=0.0).apply(tensor.double() + self.offset)
            return (shifted - self.offset).to(self.dtype(tensor.dtype))
        if not self.places:
            return self.basis.apply(tensor, self.axis, contravariant=self.contravariant)
        parts = self.basis.parts if isinstance(self.basis, Blocks) else (self.basis,)
        result = tensor.to(self.dtype(tensor.dtype), copy=True)
        for place in self.places:
            part = parts[place.block]
            index = list(place.index)
            index[self.axis] = None
            where = tuple(slice(None) if item is None else slice(item, item + 1) for item in index)
            target = result[where].narrow(self.axis, place.start, part.size)
            source = tensor[where].narrow(self.axis, place.start, part.size)
            target.copy_(part.apply(source, self.axis, contravariant=place.contravariant != self.contravariant))
        return result

    def __str__(self) -> str:
        dual = " dual" if self.contravariant else ""
        where = f", {len(self.places)} places {_digest(self.places)}" if self.places else ""
        offset = f", offset={self.offset:g}" if self.offset else ""
        return f"basis(axis={self.axis}, {self.basis}{dual}{where}{offset})"


_CARRIER = ".change_of_basis"


def carrier_name(owner: str, what: str = "") -> str:
    """The name of the weight of a linear that only carries a change of basis: `model.norm.weight.change_of_basis.diagonal`."""
    return f"{owner}{_CARRIER}{'.' if what else ''}{what}"


def is_carrier(name: str) -> bool:
    """Whether the weight called `name` belongs to such a linear, which is no layer of the model and stays in high precision."""
    return _CARRIER in name


def change_basis(constant: Constant, change: ChangeBasis) -> Constant:
    """The constant in another basis; a change of the same axis that it follows and this one become one."""
    bare = uncast(constant)
    last = bare.transforms[-1] if bare.transforms else None
    if isinstance(last, ChangeBasis) and replace(last, basis=change.basis) == change:
        composed = replace(change, basis=compose(last.basis, change.basis))
        return then_before_casts(replace(bare, transforms=bare.transforms[:-1]), composed, constant.dtype)
    return then_before_casts(constant, change, constant.dtype)


def then_before_casts(constant: Constant, transform: Transform, dtype: torch.dtype) -> Constant:
    """The constant with a transform that goes before the casts at the end of its log, rounded to `dtype` at the end."""
    changed = uncast(constant).then(transform)
    return changed if changed.dtype == dtype else changed.then(Cast(dtype))


def _digest(places: tuple[Place, ...]) -> str:
    """Eight hex digits."""
    return hashlib.sha256(repr(places).encode()).hexdigest()[:8]
