"""Sequences that come, go and are set aside at random, for whatever engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.runtime.sequences import SequenceEngine

TEXT = torch.randint(3, 100, (400,), generator=torch.Generator().manual_seed(7)).tolist()


@dataclass
class Told:
    """A sequence, and the logits that were given out along it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def copy(self) -> Told:
        return Told(self.prompt, list(self.tokens), list(self.logits))


def assert_as_alone(engine: SequenceEngine, told: Sequence[Told], *, exact: bool, within: float = 1e-5, same_tokens: bool = True) -> None:
    """Each sequence again, by itself, in an engine without pages: bit for bit, or within a share of the largest and the same tokens.

    An engine on CPUs that is made for one sequence alone may sum in another order than one that several share.
    """
    for one in told:
        expected = torch.cat([engine.prefill([one.prompt]), *(engine.decode([token]) for token in one.tokens)])
        found = torch.stack(one.logits)
        if exact:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=within * float(expected.abs().max()))
            assert not same_tokens or torch.equal(found.argmax(-1), expected.argmax(-1))


class Story:
    """Random actions on an engine, and what each sequence saw."""

    def __init__(self, engine: SequenceEngine, seed: int) -> None:
        self.engine, self.choose = engine, random.Random(seed)
        self.rows: dict[int, Told] = {}
        self.aside: list[tuple[Any, Told]] = []
        self.told: list[Told] = []
        self.done: set[str] = set()

    def act(self) -> None:
        action = self.choose.choice(["join", "step", "step", "step", "step", "fork", "leave", "suspend", "resume"])
        free = len(self.rows) < self.engine.max_batch
        if action == "join" and free:
            start, size = self.choose.randrange(300), self.choose.randint(1, 50)
            row, logits = self.engine.join(TEXT[start : start + size])
            self._enter(row, Told(TEXT[start : start + size], [], [logits]))
        elif action == "step" and self.rows:
            self.step(self.choose.sample(sorted(self.rows), self.choose.randint(1, len(self.rows))))
        elif action == "fork" and free and self.rows:
            source = self.choose.choice(sorted(self.rows))
            self._enter(self.engine.fork(source), self.rows[source].copy())
        elif action in ("leave", "suspend") and self.rows:
            row = self.choose.choice(sorted(self.rows))
            if action == "leave":
                self.engine.leave(row)
            else:
                self.aside.append((self.engine.suspend(row), self.rows[row]))
            del self.rows[row]
        elif action == "resume" and free and self.aside:
            saved, told = self.aside.pop(0)
            self.rows[self.engine.resume(saved)] = told
        else:
            return
        self.done.add(action)

    def _enter(self, row: int, told: Told) -> None:
        assert row not in self.rows
        self.rows[row] = told
        self.told.append(told)

    def step(self, rows: Sequence[int]) -> None:
        for _ in range(self.choose.randint(1, 8)):
            tokens = {row: self.choose.randrange(3, 100) for row in rows}
            for (row, token), logits in zip(tokens.items(), self.engine.step(tokens), strict=True):
                self.rows[row].tokens.append(token)
                self.rows[row].logits.append(logits)
