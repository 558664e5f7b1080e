"""Which prompts begin alike: a common beginning is read once, and its pages are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Beginning:
    """The first `length` tokens of a prompt are those of row `donor`."""

    donor: int
    length: int


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def shared_beginnings(
    prompts: Mapping[int, Sequence[int]], live: Mapping[int, Sequence[int]], shareable: Callable[[int, int], int]
) -> dict[int, Beginning]:  # fmt: skip
    """For each row of `prompts` that begins as a row before it or one of `live`, the longest such beginning.

    The last token of a prompt is always read, since its logits are wanted. A prompt still being read can be left at any token that it
    reads itself; of a `live` row, `shareable(row, length)` says how many of the first `length` tokens can be taken over.
    """
    found: dict[int, Beginning] = {}
    earlier: dict[int, Sequence[int]] = {}
    for row, prompt in prompts.items():
        ready = [Beginning(donor, shareable(donor, common_length(prompt[:-1], tokens))) for donor, tokens in live.items()]
        coming = [Beginning(donor, common_length(prompt[:-1], tokens)) for donor, tokens in earlier.items()]
        passing = [part for part in coming if part.donor not in found or part.length >= found[part.donor].length]
        best = max((*ready, *passing), key=lambda beginning: beginning.length, default=None)
        if best is not None and best.length:
            found[row] = best
        earlier[row] = prompt
    return found


def next_parts(
    prompts: Mapping[int, Sequence[int]], lengths: Sequence[int], waiting: Mapping[int, Beginning], chunk: int
) -> dict[int, Sequence[int]]:  # fmt: skip
    """The tokens that each row reads next: at most `chunk`, and none beyond a place where another row of `waiting` is to begin."""
    parts = {}
    for row, prompt in prompts.items():
        start = lengths[row]
        if row not in waiting and start < len(prompt):
            stops = [other.length for other in waiting.values() if other.donor == row and other.length > start]
            parts[row] = prompt[start : min(start + chunk, *stops, len(prompt))]
    return parts
