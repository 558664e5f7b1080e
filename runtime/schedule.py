"""Who is in the batch: prompts wait for a row, run in it, make room for others when pages are short, and leave when they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from qcompile.errors import CapacityError, QCompileError
from qcompile.ir.lowered import Engine, Stored
from qcompile.runtime.rows import Row, StopRules
from qcompile.runtime.sampling import Sampler


def run_rows(engine: Engine, rows: Sequence[Row], rules: StopRules, sampler: Sampler) -> Iterator[tuple[int, str]]:
    """Generate for all rows, giving (row, text piece) after each token; a row ends at its own time, and the next one takes its place.

    The engine starts over: sequences that it holds leave first.

    Raises:
        CapacityError: if a prompt is longer than the cache: at once, before a piece is asked for.
    """
    capacity = engine.max_context
    for row in rows:
        if not row.prompt:
            raise QCompileError("generate: expected at least one token in each prompt, got an empty prompt")
        if len(row.prompt) > capacity:
            raise CapacityError(
                f"generate: expected a prompt of at most {capacity} tokens, got {len(row.prompt)}; shorten it, or load with "
                f"max_context={len(row.prompt) + rules.max_new_tokens}"
            )
    return Schedule(engine, rows, rules, sampler).run()


class Schedule:
    """The rows of an engine, filled as they become free.

    Where sequences share fewer pages than they come to need, the one that joined last is set aside, as it is, until pages are free again:
    it goes on with the same numbers.
    """

    def __init__(self, engine: Engine, rows: Sequence[Row], rules: StopRules, sampler: Sampler) -> None:
        """All rows wait."""
        self.engine, self.rows, self.rules, self.sampler = engine, rows, rules, sampler
        self._waiting = deque(range(len(rows)))
        self._aside: deque[tuple[int, Stored, int]] = deque()
        self._numbers: dict[int, int] = {}  # row of the engine -> of `rows`, in the order of joining
        self._next: dict[int, int] = {}  # row of the engine -> the token that it takes next

    def run(self) -> Iterator[tuple[int, str]]:
        """Step until all are done: (row, text piece) after each token."""
        for row in self.engine.rows:  # those of a stream that was given up, too
            self.engine.leave(row)
        while self._waiting or self._aside or self._next:
            self._return()
            yield from self._admit()
            yield from self._step()

    def _return(self) -> None:
        """Those set aside come before those that have not begun."""
        while self._aside and self.engine.has_room([self._aside[0][1].length]):
            number, stored, token = self._aside.popleft()
            row = self.engine.resume(stored)
            self._numbers[row], self._next[row] = number, token

    def _admit(self) -> Iterator[tuple[int, str]]:
        taken: list[int] = []
        while self._waiting and not self._aside and self._fits([*taken, self._waiting[0]]):
            taken.append(self._waiting.popleft())
        if taken:
            rows, logits = self.engine.join_all([self.rows[number].prompt for number in taken])
            self._numbers |= zip(rows, taken, strict=True)
            yield from self._accept(rows, logits)

    def _fits(self, taken: Sequence[int]) -> bool:
        """The first prompt of an empty engine is tried in any case: if it does not fit, the engine says why."""
        return (not self._numbers and len(taken) == 1) or self.engine.has_room([len(self.rows[number].prompt) for number in taken])

    def _step(self) -> Iterator[tuple[int, str]]:
        while self._next:
            try:
                logits = self.engine.step(self._next)
            except CapacityError:
                if len(self._next) == 1:
                    raise
                self._set_aside()
            else:
                yield from self._accept(list(self._next), logits)
                return

    def _set_aside(self) -> None:
        row = list(self._next)[-1]
        self._aside.appendleft((self._numbers.pop(row), self.engine.suspend(row), self._next.pop(row)))

    def _accept(self, rows: Sequence[int], logits: Tensor) -> Iterator[tuple[int, str]]:
        """Choose a token for each row; who is done leaves."""
        numbers = [self._numbers[row] for row in rows]
        seen = [self.rows[number].prompt + self.rows[number].tokens for number in numbers]
        for row, number, token in zip(rows, numbers, self.sampler(logits, seen, numbers), strict=True):
            piece = self.rows[number].accept(token, self.rules, self.engine.max_context)
            if self.rows[number].done:
                self.engine.leave(row)
                del self._numbers[row]
                self._next.pop(row, None)
            else:
                self._next[row] = token
            yield number, piece
