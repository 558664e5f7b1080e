"""Steps down a noisy slope, against the mean of the gradients of late."""

from __future__ import annotations

import torch
from torch import Tensor

_MEAN, _SQUARE = 0.9, 0.97
"""What of the mean of gradients, and of their squares, a step keeps."""


class Descent:
    """Moves values in place.

    With `alike` all are measured by the root mean square of all their gradients, so that a value moves the further the more depends on it:
    of weights, only those worth it cross into another cell. Else each is measured by its own (Adam, arXiv:1412.6980).
    """

    def __init__(self, values: Tensor, rate: float, *, alike: bool) -> None:
        """Move `values` by about `rate` a step while gradients agree."""
        self._values, self._rate = values, rate
        self._mean = torch.zeros_like(values)
        self._alike = alike
        self._square = values.new_zeros(()) if alike else torch.zeros_like(values)
        self._steps = 0

    def step(self, gradient: Tensor, share: float) -> None:
        """One step at a share of the rate; `gradient` has the shape of the values."""
        self._steps += 1
        square = gradient.norm().square() / gradient.numel() if self._alike else gradient.square()
        self._mean.lerp_(gradient, 1 - _MEAN)
        self._square.lerp_(square, 1 - _SQUARE)
        # Both means started at 0: they are what they would be of the steps taken so far.
        size = (self._square / (1 - _SQUARE**self._steps)).sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)
        self._values.addcdiv_(self._mean, size, value=-self._rate * share / (1 - _MEAN**self._steps))
