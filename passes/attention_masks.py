"""What an attention may see, found out by computing its mask at a few lengths: all, the past, a window of the past, without padding.

A mask that agrees with none of these is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph
from qcompile.passes.probing import Probe, UnknownValueError, behind

_LENGTHS = (1, 2, 7, 16)
_LONGEST = 8200
"""The longest mask that is computed, one truth value for each pair."""
_NO_SIZE = 1 << 31
"""Numbers from here on mean no length but the end of anything."""
_HIDDEN = -1e4
"""A score this much lower has no weight."""


@dataclass(frozen=True)
class Visibility:
    """Keys that a query sees: up to itself if `causal`, the last `window` of those (0: all), real tokens only if `padded`."""

    causal: bool
    window: int = 0
    padded: bool = False

    def keep(self, padding: Tensor) -> Tensor:
        """Bool [B, 1, S, S] for padding [B, S]."""
        batch, length = padding.shape
        row, column = torch.arange(length).unsqueeze(1), torch.arange(length)
        keep = torch.ones(length, length, dtype=torch.bool)
        if self.causal:
            keep = column <= row
        if self.window:
            keep = keep & (column > row - self.window)
        keep = keep.expand(batch, 1, length, length)
        return keep & (padding != 0).view(batch, 1, 1, length) if self.padded else keep


def paddings(length: int, *, anywhere: bool) -> Tensor:
    """Masks [B, S] to try: no padding, padding on the right and, if `anywhere`, on the left and between tokens."""
    full = torch.ones(length, dtype=torch.int64)
    right, left, holes = full.clone(), full.clone(), full.clone()
    right[(length + 1) // 2 :] = 0
    left[: length // 3] = 0
    holes[1 : length - 1 : 3] = 0
    return torch.stack([full, right, left, holes] if anywhere else [full, right])


def visibility(graph: Graph, node: fx.Node, mask: fx.Node) -> Visibility | None:
    """What an attention of a language model sees, where `mask` is the input [B, S] that tells padding; None if it is nothing known.

    Only queries that are tokens count: what padding sees nobody reads. Operators that take lengths instead of a mask are held to padding on
    the right, where lengths can say it.
    """
    by_length = node.args[3] is not None and node.args[3] is not mask
    lengths = _lengths(node)
    if lengths is None:
        return None
    found: Visibility | None = None
    for length in reversed(lengths):  # the longest tells the window
        padding = paddings(length, anywhere=not by_length)
        try:
            seen = _seen(graph, node, mask, padding)
        except UnknownValueError:
            return None
        guess = found or _guess(seen, padding)
        if guess is None or not _agree(guess, seen, padding):
            return None
        found = guess
    return found


def _lengths(node: fx.Node) -> list[int] | None:
    """Lengths to try: longer than every number in the mask's arithmetic, which might be a window; None if that is too long."""
    numbers = {abs(item) for mask in node.args[3:5] if isinstance(mask, fx.Node) for used in behind(mask) for item in _integers(used)}
    longest = max([number for number in (*numbers, _window(node)) if number < _NO_SIZE], default=0)
    if longest + 3 > _LONGEST:
        return None
    return sorted({*_LENGTHS, longest + 3})


def _window(node: fx.Node) -> int:
    found: Any = node.args[7] if len(node.args) > 7 else 0
    return int(found)


def _integers(node: fx.Node) -> Iterator[int]:
    flat: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), flat.append)
    yield from (item for item in flat if isinstance(item, int) and not isinstance(item, bool))


def _seen(graph: Graph, node: fx.Node, mask: fx.Node, padding: Tensor) -> Tensor:
    """Bool [B, H or 1, S, S]: which keys have a weight.

    Raises:
        UnknownValueError: if the mask depends on more than sizes and padding, or is no mask.
    """
    batch, length = padding.shape
    sizes = dict(zip((str(size) for size in mask.meta["val"].shape), (batch, length), strict=True))
    probe = Probe(graph, sizes, {mask: padding})
    padded, bias, causal = node.args[3], node.args[4], bool(node.args[6])
    seen = Visibility(causal, _window(node)).keep(padding)
    if isinstance(padded, fx.Node):
        seen = seen & (probe.value(padded) != 0).view(batch, 1, 1, length)
    if isinstance(bias, fx.Node):
        value = probe.value(bias)
        visible = value == 0
        if not bool((visible | (value <= _HIDDEN)).all()):
            raise UnknownValueError("masks: expected 0 and very low numbers, got a bias between")
        seen = seen & visible
    return seen


def _guess(seen: Tensor, padding: Tensor) -> Visibility | None:
    """From a long mask without padding in its first row."""
    plain = seen[0, 0]
    length = plain.shape[0]
    causal = length > 1 and not bool(plain[0, 1:].any())
    count = int(plain[-1].sum())
    window = count if causal and count < length else 0
    for padded in (False, True):
        guess = Visibility(causal, window, padded)
        if _agree(guess, seen, padding):
            return guess
    return None


def _agree(guess: Visibility, seen: Tensor, padding: Tensor) -> bool:
    """Whether both say the same of all queries that are tokens.

    A window between whose tokens there is padding may count columns or tokens: such rows decide nothing, and a cache holds no padding.
    """
    tokens = padding != 0
    if guess.window:
        tokens = tokens & ~_has_holes(padding)
    return not bool(((guess.keep(padding) != seen) & tokens.view(padding.shape[0], 1, -1, 1)).any())


def _has_holes(padding: Tensor) -> Tensor:
    """Bool [B, 1]: whether padding stands between tokens."""
    return ((padding[:, 1:] != 0) & (padding[:, :-1] == 0)).sum(-1, keepdim=True) + (padding[:, :1] != 0) > 1
