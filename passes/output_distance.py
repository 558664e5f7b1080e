"""How far outputs are from those of the model before anything was rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_ROWS = 128
"""Positions whose log-probabilities stand in float64 at a time."""


class Distance(Protocol):
    """A distance from outputs that were given; batches hold what a language model's logits are, or all outputs of a module."""

    def __call__(self, found: Sequence[Sequence[Tensor]]) -> float:
        """Of the outputs of each batch."""


class TokenKl:
    """Mean KL(reference ‖ found) of the next token's distribution in nats, over every token of a window but its last, as `evaluate` has it."""

    def __init__(self, wanted: Sequence[Sequence[Tensor]]) -> None:
        """`wanted` are the reference's logits [B, S, V]."""
        self._wanted = [torch.log_softmax(_rows(batch[0]), -1) for batch in wanted]

    def __call__(self, found: Sequence[Sequence[Tensor]]) -> float:
        """The mean over all batches."""
        total, count = 0.0, 0
        for wanted, batch in zip(self._wanted, found, strict=True):
            for log_p, logits in zip(wanted.split(_ROWS), _rows(batch[0]).split(_ROWS), strict=True):
                wide = log_p.double()
                difference = wide - torch.log_softmax(logits.double(), -1)
                total += float(torch.where(wide == -math.inf, 0.0, wide.exp() * difference).sum())
                count += len(logits)
        return total / count


def _rows(logits: Tensor) -> Tensor:
    return logits[:, :-1].flatten(0, 1).float()


class OutputNoise:
    """Energy of the error over the energy of the reference, mean over float outputs: 10^(-SQNR/10)."""

    def __init__(self, wanted: Sequence[Sequence[Tensor]]) -> None:
        """`wanted` are the reference's outputs."""
        self._wanted = wanted

    def __call__(self, found: Sequence[Sequence[Tensor]]) -> float:
        """Over all batches together."""
        ratios = []
        for place, first in enumerate(self._wanted[0]):
            if first.is_floating_point():
                pairs = [(batch[place].double(), wanted[place].double()) for batch, wanted in zip(found, self._wanted, strict=True)]
                noise = sum(float((a - b).square().sum()) for a, b in pairs)
                ratios.append(noise / (sum(float(b.square().sum()) for _, b in pairs) + 1e-300))
        return sum(ratios) / max(1, len(ratios))
