"""From logits to a token: greedy or drawn, after the usual filters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import QCompileError


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen; the defaults are greedy.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities first reach p (arXiv:1904.09751).
        min_p: drop tokens less likely than min_p times the likeliest (arXiv:2407.01082).
        repetition_penalty: above 1, logits of tokens seen so far are divided (if positive) or multiplied by it (arXiv:1909.05858).
        seed: of the random generator; None draws anew each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise QCompileError(f"{name}={getattr(self, name)}: expected {expected}")


class Sampler:
    """Chooses one token per sequence, each with a random generator of its own: who is beside it does not matter."""

    def __init__(self, parameters: SamplingParameters) -> None:
        """Every generator starts from the seed and the sequence's number."""
        self.parameters = parameters
        self._seed = torch.Generator().seed() if parameters.seed is None else parameters.seed
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits: Tensor, seen: Sequence[Sequence[int]], sequences: Sequence[int] | None = None) -> list[int]:
        """One token for each row of logits [B, V].

        `seen` holds each row's tokens so far, prompt included; `sequences` says which of all sequences the rows are, 0 … B - 1 by default.
        """
        scores = logits.to(device="cpu", dtype=torch.float32)
        if self.parameters.repetition_penalty != 1:
            scores = penalized(scores, seen, self.parameters.repetition_penalty)
        if self.parameters.temperature == 0:
            chosen: list[int] = scores.numpy().argmax(axis=-1).tolist()  # of torch's that of one row takes twice as long
            return chosen
        likely = probabilities(scores, self.parameters)
        numbers = range(len(scores)) if sequences is None else sequences
        return [int(torch.multinomial(row, 1, generator=self._generator(number))) for row, number in zip(likely, numbers, strict=True)]

    def _generator(self, sequence: int) -> torch.Generator:
        if sequence not in self._generators:
            digest = hashlib.sha256(f"{self._seed} {sequence}".encode()).digest()
            self._generators[sequence] = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return self._generators[sequence]


def penalized(scores: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Scores [B, V] with every token that a row has seen made less likely."""
    scores = scores.clone()
    for row, tokens in enumerate(seen):
        index = torch.tensor(sorted(set(tokens)))
        found = scores[row, index]
        scores[row, index] = torch.where(found > 0, found / penalty, found * penalty)
    return scores


def probabilities(scores: Tensor, parameters: SamplingParameters) -> Tensor:
    """The distribution [B, V] that a token is drawn from: temperature, then top-k, top-p and min-p, then normalised."""
    scores = scores / parameters.temperature
    if 0 < parameters.top_k < scores.shape[-1]:
        least = scores.topk(parameters.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if parameters.top_p < 1:
        ordered, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= parameters.top_p  # the token that reaches p is kept
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if parameters.min_p > 0:
        likely = scores.softmax(-1)
        scores = scores.masked_fill(likely < parameters.min_p * likely.amax(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1)
