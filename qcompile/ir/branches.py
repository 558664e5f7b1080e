"""Weights that are split in two: the part that is quantized, and a branch of it that stays in high precision.

A branch's constants are known by their names: they count among the stored bits of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.constants import Constant

_MARK = ".branch."


def branch_name(weight: str, part: str) -> str:
    """The name of a branch's constant: `model.layers.0.mlp.up_proj.weight.branch.low_rank_in`."""
    return f"{weight}{_MARK}{part}"


def is_branch(name: str) -> bool:
    """Whether the constant called `name` belongs to a branch."""
    return _MARK in name


@dataclass(frozen=True)
class Subtract:
    """Take `left · right` away from a matrix [N, K]; left [N, R], right [R, K]. Computed in at least float32."""

    left: Constant
    right: Constant

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(dtype, torch.float32)

    def apply(self, tensor: Tensor) -> Tensor:
        """The rest."""
        work = self.dtype(tensor.dtype)
        return torch.addmm(tensor.to(work), self.left.materialize().to(work), self.right.materialize().to(work), alpha=-1)

    def __str__(self) -> str:
        return f"subtract({self.left.key} x {self.right.key})"


@dataclass(frozen=True)
class TakeColumns:
    """The columns `index` [R] of a matrix [N, K]: [N, R]."""

    index: Constant

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As many columns as the index is long."""
        return (shape[0], *self.index.shape)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Unchanged."""
        return dtype

    def apply(self, tensor: Tensor) -> Tensor:
        """Select."""
        return tensor.index_select(1, self.index.materialize())

    def __str__(self) -> str:
        return f"take-columns({self.index.key})"


@dataclass(frozen=True)
class ClearColumns:
    """Zeros in the columns `index` [R] of a matrix [N, K]."""

    index: Constant

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Unchanged."""
        return dtype

    def apply(self, tensor: Tensor) -> Tensor:
        """Clear."""
        return tensor.index_fill(1, self.index.materialize().long(), 0)

    def __str__(self) -> str:
        return f"clear-columns({self.index.key})"
