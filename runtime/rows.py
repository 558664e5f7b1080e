"""One sequence that is being generated: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qcompile.errors import QCompileError
from qcompile.runtime.tokenizer import TextStream


@dataclass(frozen=True)
class StopRules:
    """When a row ends: any of the tokens, any of the strings, or this many new tokens."""

    max_new_tokens: int
    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QCompileError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")


@dataclass
class Row:
    """One sequence of a batch: its prompt, what came since, and what of the text was given out."""

    prompt: list[int]
    text: TextStream | None = None
    tokens: list[int] = field(default_factory=list)
    held: str = ""
    done: bool = False

    def accept(self, token: int, rules: StopRules, capacity: int) -> str:
        """Add a token; the text that may be given out now. Sets `done` at a stop."""
        if token in rules.tokens:
            self.done = True
            return self._flush(rules)
        self.tokens.append(token)
        if self.text is not None:
            self.held += self.text.push(token)
        piece = self._settle(rules)
        if not self.done and (len(self.tokens) >= rules.max_new_tokens or len(self.prompt) + len(self.tokens) > capacity):
            self.done = True
            piece += self._flush(rules)
        return piece

    def _flush(self, rules: StopRules) -> str:
        """The rest of the text at the end of a row; a stop string in it still cuts."""
        if self.text is not None:
            self.held += self.text.finish()
        cut = first_stop(self.held, rules.strings)
        piece = self.held if cut is None else self.held[:cut]
        self.held = ""
        return piece

    def _settle(self, rules: StopRules) -> str:
        """What cannot become part of a stop string any more."""
        cut = first_stop(self.held, rules.strings)
        if cut is not None:
            piece, self.held, self.done = self.held[:cut], "", True
            return piece
        keep = longest_border(self.held, rules.strings)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return piece


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in `text`, or None."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def longest_border(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max((size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])), default=0)
