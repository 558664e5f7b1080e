"""The entry that a folded per-channel factor leaves in a constant's log."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScaleAxis:
    """Slice i along `axis` times `factor[i]`; any finite factor, zero included. The result is at least float32, computed in float64."""

    axis: int
    factor: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Unchanged."""
        return shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(dtype, torch.float32)

    def apply(self, tensor: Tensor) -> Tensor:
        """The product, rounded once."""
        form = [1] * tensor.dim()
        form[self.axis] = -1
        return (tensor.double() * self.factor.double().view(form)).to(self.dtype(tensor.dtype))

    def __str__(self) -> str:
        digest = hashlib.sha256(self.factor.double().numpy().tobytes()).hexdigest()[:8]
        return f"scale(axis={self.axis}, {self.factor.numel()} factors {digest})"
