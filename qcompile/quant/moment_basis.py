"""Orthogonal maps learned from second moments alone, for channels that are scaled one by one afterwards and then mixed.

Where each channel takes its best scale d and a Hadamard matrix mixes all of them, rounding inputs or weights to a grid leaves an error
in proportion to `tr(D R S Rᵀ D) · tr(D⁻¹ R G Rᵀ D⁻¹)` with S = XᵀX and G = WᵀW. At the best D that is `(Σ √(sᵢ gᵢ))²`, with s and g
the diagonals of `R S Rᵀ` and `R G Rᵀ`: only R is left to choose. It is least where R shows both in a basis in which few channels matter, so
it also finds such a basis where something has hidden it. Shapes: moments [K, K], maps [K, K].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.quant.learned_basis import Course, turned

_TINY = torch.finfo(torch.float32).tiny
_LEAST = 1e-6
"""Of the mean over channels."""


@dataclass(frozen=True)
class MomentPair:
    """Linears that read one value.

    Attributes:
        inputs: second moment of what they read, [K, K].
        weights: WᵀW of all their rows, [K, K].
    """

    inputs: Tensor
    weights: Tensor

    @property
    def signal(self) -> Tensor:
        """Energy of the outputs, which no map moves."""
        return (self.inputs * self.weights).sum().clamp(min=_TINY)

    def noise(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """`(Σ √(sᵢ gᵢ))² / K` over the signal, and its gradient [K, K] in the rotation."""
        moved = rotation @ self.inputs, rotation @ self.weights
        s, g = (_diagonal(part, rotation) for part in moved)
        total, share = (s * g).sqrt().sum(), self.signal * len(rotation)
        slope = (g / s).sqrt()[:, None] * moved[0] + (s / g).sqrt()[:, None] * moved[1]
        return total.square() / share, slope * (2 * total / share)


def _diagonal(moved: Tensor, rotation: Tensor) -> Tensor:
    """That of `moved · rotationᵀ`, no less than what float32 tells from 0: a layer norm leaves a direction without any energy."""
    found = (moved * rotation).sum(1)
    return found.clamp(min=max(_TINY, _LEAST * float(found.mean())))


def principal_axes(pairs: Sequence[MomentPair]) -> Tensor:
    """The rotation to the principal axes of the mean second moment, the largest first; it does not depend on the basis that is given."""
    mean = sum((pair.inputs.double() / pair.inputs.diagonal().sum().clamp(min=_TINY) for pair in pairs), torch.zeros(()).double())
    assert isinstance(mean, Tensor)
    axes: Tensor = torch.linalg.eigh(mean).eigenvectors
    return axes.flip(1).T.float().contiguous()


def mean_moment_noise(pairs: Sequence[MomentPair], rotation: Tensor) -> float:
    """Of `MomentPair.noise`."""
    return float(torch.stack([pair.noise(rotation)[0] for pair in pairs]).mean())


def learn_from_moments(
    pairs: Sequence[MomentPair], start: Tensor, course: Course, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """A map [K, K] that leaves less noise than `start`, orthogonal up to float32, by Cayley steps with momentum."""
    rotation, momentum = start.float(), torch.zeros_like(start, dtype=torch.float32)
    for step, (drawn, share) in enumerate(course.draws(len(pairs))):
        gradient = torch.stack([pairs[index].noise(rotation)[1] for index in drawn]).mean(0) @ rotation.T
        rotation, momentum = turned(rotation, momentum, gradient, course.rate * share)
        if progress is not None:
            progress(step + 1, course.steps)
    return rotation
