"""Log entries by which a weight takes over what a norm did to its input; all in float64, rounded once, at least to float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.constants import Constant, widened


@dataclass(frozen=True, eq=False)
class _Fold:
    """Keeps the shape."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(dtype, torch.float32)

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor after."""
        return self.wide(tensor.double()).to(self.dtype(tensor.dtype))

    def wide(self, tensor: Tensor) -> Tensor:
        """The same in float64."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Scaled(_Fold):
    """Times `offset + gain` along `axis`: a gain [K] taken from the norm that wrote what a weight [N, K] reads along its axis 1."""

    axis: int
    gain: Constant
    offset: float = 0.0

    def wide(self, tensor: Tensor) -> Tensor:
        """A product per channel."""
        gain = widened(self.gain).materialize() + self.offset
        shape = [1] * tensor.dim()
        shape[self.axis] = -1
        return tensor * gain.view(shape)

    def __str__(self) -> str:
        offset = f"{self.offset:g} + " if self.offset else ""
        return f"times(axis={self.axis}, {offset}{self.gain.key})"


@dataclass(frozen=True, eq=False)
class Centred(_Fold):
    """Less its mean along `axis`: what is written with it has mean 0, and a layer norm of that is an RMS norm (arXiv:2401.15024)."""

    axis: int

    def wide(self, tensor: Tensor) -> Tensor:
        """The projection 1 - 11ᵀ/K."""
        return tensor - tensor.mean(self.axis, keepdim=True)

    def __str__(self) -> str:
        return f"centred(axis={self.axis})"


@dataclass(frozen=True, eq=False)
class PlusProduct(_Fold):
    """A bias [N] plus `weight · vector`: what a constant [K] added to its input adds to the result of a linear [N, K]."""

    weight: Constant
    vector: Constant

    def wide(self, tensor: Tensor) -> Tensor:
        """One matrix-vector product."""
        return tensor + widened(self.weight).materialize() @ widened(self.vector).materialize()

    def __str__(self) -> str:
        return f"plus({self.weight.key} @ {self.vector.key})"
