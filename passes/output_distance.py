"""How far outputs are from those of the model before anything was rounded, asked for again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qcompile.passes.effects import divergence_per_token, noise

_CHUNK_BYTES = 16 << 20
"""Of the logits compared at a time: small enough for the allocator to reuse their memory."""
_NEAR = 30.0
"""Difference of logits up to which exponentials are taken of it as it is."""


class Distance(Protocol):
    """A distance from outputs that were given; batches hold a language model's logits alone, or all outputs of a module."""

    def __call__(self, found: Sequence[Sequence[Tensor]]) -> float:
        """Of the outputs of each batch."""


class TokenKl:
    """Mean KL(reference ‖ found) of the next token's distribution in nats, over every token of a window but its last, as `evaluate` has it.

    With p of the reference and differences d of logits it is log E_p[exp(d - E_p[d])]: nothing cancels where d is small, so float32 will
    do, and one exponential per logit.
    """

    def __init__(self, wanted: Sequence[Sequence[Tensor]]) -> None:
        """`wanted` are the reference's logits [B, S, V]."""
        self._wanted = [_rows(batch[0]) for batch in wanted]
        self._likely = [rows.softmax(-1) for rows in self._wanted]

    def __call__(self, found: Sequence[Sequence[Tensor]]) -> float:
        """The mean over all batches."""
        total = 0.0
        for wanted, likely, batch in zip(self._wanted, self._likely, found, strict=True):
            size = max(1, _CHUNK_BYTES // (4 * wanted.shape[-1]))
            for rows in zip(*(torch.split(part, size) for part in (wanted, likely, _rows(batch[0]))), strict=True):
                total += _sum_of_kl(*rows)
        return total / sum(map(len, self._wanted))


def _rows(logits: Tensor) -> Tensor:
    return logits[:, :-1].flatten(0, 1).float()


def _sum_of_kl(wanted: Tensor, likely: Tensor, found: Tensor) -> float:
    """Over rows [T, V] of logits, `likely` being the softmax of those wanted."""
    difference = found - wanted
    difference -= (likely * difference).sum(-1, keepdim=True)
    if difference.max() < _NEAR:  # not so for NaN either
        return float(torch.log1p((likely * difference.expm1_()).sum(-1).double()).sum())
    mean = divergence_per_token(found.unsqueeze(0), wanted.unsqueeze(0), None)
    return float("inf") if mean is None else mean * len(found)


class OutputNoise:
    """Energy of the error over the energy of the reference, mean over float outputs and batches: 10^(-SQNR/10)."""

    def __init__(self, wanted: Sequence[Sequence[Tensor]]) -> None:
        """`wanted` are the reference's outputs."""
        self._wanted = wanted

    def __call__(self, found: Sequence[Sequence[Tensor]]) -> float:
        """The mean."""
        pairs = [(a, b) for batch, wanted in zip(found, self._wanted, strict=True) for a, b in zip(batch, wanted, strict=True)]
        shares = [noise(a, b) for a, b in pairs if b.is_floating_point()]
        return sum(shares) / max(1, len(shares))
