"""Sequences that come and go: what every engine over a cache of rows offers, whatever it runs on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from qcompile.errors import ArtifactError, CapacityError, EngineError
from qcompile.ir.constants import Constant
from qcompile.runtime.cached_rows import CachedRows
from qcompile.runtime.prefixes import Beginning, next_parts, shared_beginnings
from qcompile.runtime.saved_sequence import Origin, SavedSequence, fingerprint, read_sequence, write_sequence

PADDING = -1
"""The position of a token that is not there: it is not stored and attends to nothing."""
Cache = TypeVar("Cache", bound=CachedRows)


def require_cache(cache: Cache | None) -> Cache:
    """The cache of an engine that has one.

    Raises:
        EngineError: for a model that is no language model.
    """
    if cache is None:
        raise EngineError("this model has no cache: expected a causal language model for prefill and decode; call forward")
    return cache


class SequenceEngine:
    """Rows of sequences, each at its own position; a row may join and leave between steps.

    A subclass says how tokens run (`compute`), over which `cache`, and on what (`working`). `prefill` and `decode` are the simple form:
    a batch that starts over, and one token for every row.

    Attributes:
        max_batch: rows.
        share_prefixes: whether a prompt that begins as a row there is, or as another prompt, takes its pages over. A shared beginning is
            read in other chunks than the prompt alone would be, so that logits may differ in their last bits.
    """

    max_batch: int
    share_prefixes: bool = False
    chunk: int = 1
    """Tokens of a prompt that are read at once, at most: what the memory of `prefill` is planned for."""
    vocabulary: int = 1 << 62

    def __init__(self) -> None:
        """No row is taken."""
        self._histories: dict[int, list[int] | None] = {}

    @property
    def cache(self) -> CachedRows:
        """Where keys and values are; prepares the engine."""
        raise NotImplementedError

    @property
    def model_constants(self) -> Mapping[str, Constant]:
        """What tells the model from another."""
        raise NotImplementedError

    @property
    def cache_format(self) -> str:
        """How the cache stores tokens, in words."""
        raise NotImplementedError

    def compute(self, name: str, rows: Sequence[int], ids: Tensor, positions: Tensor) -> Tensor:
        """Run tokens and positions [n, S] of rows through an entry; the last logits [n, V] of each, which the caller may keep."""
        raise NotImplementedError

    def working(self) -> contextlib.AbstractContextManager[object]:
        """Where memory of the cache is touched."""
        return contextlib.nullcontext()

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that are taken, in order."""
        return tuple(sorted(self._histories))

    @property
    def state(self) -> list[int]:
        """The tokens stored for each of `rows`."""
        return [self.cache.lengths[row] for row in self.rows]

    def tokens_of(self, row: int) -> list[int] | None:
        """The tokens stored for a row; None where they were chosen on a device and never seen here."""
        self._require_live("tokens_of", [row])
        history = self._histories[row]
        return None if history is None else list(history)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a batch of sequences over: prompts in chunks, the logits [B, V] after each one's last token.

        Raises:
            CapacityError: for more sequences or tokens than there is room for; the sequences there are stay as they were.
            EngineError: for a sequence without tokens or a token that the model does not know; likewise.
        """
        cache = self.cache
        self._require_prompts("prefill", prompts)
        self._require_places("prefill", len(prompts), 0)
        cache.require_new([len(prompt) for prompt in prompts], keeping=False)
        for row in self.rows:
            self.leave(row)
        return self.join_all(prompts)[1]

    def decode(self, tokens: Sequence[int] | Tensor, *, out: Tensor | None = None) -> Tensor:
        """One more token for each of `rows`, -1 for one that takes no part; the logits [B, V] after it, which mean nothing for that one.

        They are the caller's to keep. With `out` they are written there, so that a caller who gives the same memory again and again makes
        the CPU engines take none at all.

        Raises:
            CapacityError: when a sequence has filled its part of the cache, before anything is computed.
            EngineError: for another number of tokens than there are sequences, a token that the model does not know, or an `out` of another
                number of rows.
        """
        rows = self.rows
        if not len(tokens) or len(tokens) != len(rows):
            raise EngineError(f"decode: expected a token for each of the {len(rows)} sequences of the batch, got {len(tokens)}")
        parts = [[int(token)] if token >= 0 else [] for token in tokens]
        self._require_tokens("decode", parts)
        return self._feed("decode", dict(zip(rows, parts, strict=True)), out)

    def join(self, prompt: Sequence[int]) -> tuple[int, Tensor]:
        """Read a prompt into a free row: the row, and the logits [V] after its last token. Errors as `join_all`."""
        rows, logits = self.join_all([prompt])
        return rows[0], logits[0]

    def join_all(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts into free rows at once: the rows, and the logits [n, V] after each one's last token.

        Raises:
            CapacityError: for more rows, tokens or pages than are free, before anything is computed.
            EngineError: for a prompt without tokens or a token that the model does not know; likewise.
        """
        cache = self.cache
        self._require_prompts("join", prompts)
        self._require_places("join", len(prompts), len(self._histories))
        rows = [row for row in range(self.max_batch) if row not in self._histories][: len(prompts)]
        joining = dict(zip(rows, map(list, prompts), strict=True))
        shared = self._beginnings(joining)
        cache.require_new([len(prompt) for prompt in prompts], [part.length for part in shared.values()])
        self._histories |= {row: [] for row in rows}
        try:
            logits = self._read_prompts(joining, shared)
        except BaseException:
            for row in rows:
                self.leave(row)
            raise
        return rows, logits

    def leave(self, row: int) -> None:
        """Give a row's pages back; another sequence may join in its place.

        Raises:
            EngineError: for a row that is not taken.
        """
        self._require_live("leave", [row])
        self.cache.reset([row])
        del self._histories[row]

    def step(self, tokens: Mapping[int, int], *, out: Tensor | None = None) -> Tensor:
        """One more token for some rows: the logits [n, V] after it, in the order of `tokens`; `out` as for `decode`.

        Raises:
            CapacityError: when a row or the pool of pages is full, before anything is computed.
            EngineError: for a row that is not taken, or a token that the model does not know; likewise.
        """
        self._require_live("step", tokens)
        if not tokens:
            raise EngineError("step: expected a token for at least one row, got none")
        self._require_tokens("step", [[token] for token in tokens.values()], list(tokens))
        return self._feed("decode", {row: [int(token)] for row, token in tokens.items()}, out)

    def fork(self, row: int) -> int:
        """A new row that goes on from where `row` is: pages are shared until one of both writes to them.

        Raises:
            CapacityError: if no row is free.
            EngineError: for a row that is not taken.
        """
        self._require_live("fork", [row])
        self._require_places("fork", 1, len(self._histories))
        new = next(place for place in range(self.max_batch) if place not in self._histories)
        with self.working():
            self.cache.fork(row, new)
        history = self._histories[row]
        self._histories[new] = None if history is None else list(history)
        return new

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of so many tokens could join now and all rows, these and those there are, still take a step."""
        cache, live = self.cache, len(self._histories)
        if live + len(lengths) > self.max_batch or any(length > cache.capacity for length in lengths):
            return False
        pages = sum(cache.layout.pages_for(min(length + 1, cache.capacity)) for length in lengths)
        return pages + live <= cache.pool.free

    def suspend(self, row: int) -> SavedSequence:
        """Take a sequence out of the cache into memory of the host; `resume` brings it back, bit for bit.

        Raises:
            EngineError: for a row that is not taken.
        """
        saved = self._read(row, "suspend")
        self.leave(row)
        return saved

    def resume(self, saved: SavedSequence) -> int:
        """Put a sequence that was taken out back: its row.

        Raises:
            CapacityError: if there is no room for it, before anything is changed.
        """
        self._require_places("resume", 1, len(self._histories))
        row = next(place for place in range(self.max_batch) if place not in self._histories)
        with self.working():
            self.cache.write(row, saved.length, saved.stored)
        self._histories[row] = None if saved.tokens is None else list(saved.tokens)
        return row

    def save(self, row: int, path: str | os.PathLike[str]) -> None:
        """Write a row's sequence to a file, with what it needs to be continued in an engine of this artifact; the row stays.

        Raises:
            EngineError: for a row that is not taken.
            ArtifactError: if the file cannot be written.
        """
        write_sequence(path, self._read(row, "save"), self.origin)

    def restore(self, path: str | os.PathLike[str]) -> int:
        """Go on with a sequence that `save` wrote, whatever its engine and its pages: its row.

        Raises:
            ArtifactError: for a file that is missing or damaged, or of another model or cache format.
            CapacityError: if there is no room for it. Either way nothing has changed.
        """
        saved = read_sequence(path, self.origin)
        expected = self.cache.shapes(saved.length)
        if {name: (tensor.dtype, list(tensor.shape)) for name, tensor in saved.stored.items()} != expected:
            raise ArtifactError(
                f"restore: {path}: expected the tensors of a sequence of {saved.length} tokens, got others; load the artifact that saved it"
            )
        return self.resume(saved)

    @cached_property
    def origin(self) -> Origin:
        """What a saved sequence is bound to; the constants are hashed when it is first asked for."""
        return Origin(fingerprint(self.model_constants), self.cache_format)

    def _read(self, row: int, name: str) -> SavedSequence:
        self._require_live(name, [row])
        with self.working():
            stored = self.cache.read(row)
        history = self._histories[row]
        return SavedSequence(self.cache.lengths[row], None if history is None else tuple(history), stored)

    def _beginnings(self, joining: Mapping[int, Sequence[int]]) -> dict[int, Beginning]:
        if not self.share_prefixes:
            return {}
        live = {row: history for row, history in self._histories.items() if history}
        return shared_beginnings(joining, live, self.cache.shareable)

    def _read_prompts(self, joining: Mapping[int, Sequence[int]], shared: Mapping[int, Beginning]) -> Tensor:
        """Prompts in chunks: the logits [n, V] after each one's last token."""
        lengths, waiting, last = self.cache.lengths, dict(shared), dict[int, Tensor]()
        while len(last) < len(joining):
            for row in self._begin(joining, waiting):
                del waiting[row]
            parts = next_parts(joining, lengths, waiting, self.chunk)
            logits = self._feed("prefill", parts)
            last |= {row: logits[place] for place, row in enumerate(parts) if lengths[row] == len(joining[row])}
        return torch.stack([last[row] for row in joining])

    def _begin(self, joining: Mapping[int, Sequence[int]], waiting: Mapping[int, Beginning]) -> Iterator[int]:
        """Fork what waits for a row that has come far enough: a prompt's row is left right there, so nothing has to be undone."""
        for row, part in list(waiting.items()):
            there = part.donor not in joining or self.cache.lengths[part.donor] == part.length
            if there:
                with self.working():
                    self.cache.fork(part.donor, row, part.length)
                self._histories[row] = list(joining[row][: part.length])
                yield row

    def _feed(self, name: str, parts: Mapping[int, Sequence[int]], out: Tensor | None = None) -> Tensor:
        """Run the next tokens of rows through an entry: the last logits [n, V] of each, in `out` if it is given."""
        rows, counts = list(parts), [len(part) for part in parts.values()]
        if out is not None and len(out) != len(rows):
            raise EngineError(f"{name}: out: expected logits of {len(rows)} rows, got shape {list(out.shape)}; leave it out for new memory")
        with self.working():
            self.cache.reserve(counts, rows)
            logits = self._run_tokens(name, parts, out)
        self.cache.advance(counts, rows)
        for row, part in parts.items():
            history = self._histories[row]
            if history is not None:
                history.extend(part)
        return logits

    def _run_tokens(self, name: str, parts: Mapping[int, Sequence[int]], out: Tensor | None) -> Tensor:
        """What `_feed` does once there is room."""
        rows, width = list(parts), max(1, *map(len, parts.values()))
        ids = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts.values()])
        positions = []
        for row, part in parts.items():
            start = self.cache.lengths[row]
            positions.append([*range(start, start + len(part)), *[PADDING] * (width - len(part))])
        logits = self.compute(name, rows, ids, torch.tensor(positions))
        return logits if out is None else out.copy_(logits)

    def _advance(self, name: str, rows: Sequence[int], counts: Sequence[int], ids: Tensor, positions: Tensor) -> Tensor:
        with self.working():
            self.cache.reserve(counts, rows)
            logits = self.compute(name, rows, ids, positions)
        self.cache.advance(counts, rows)
        return logits

    def _require_live(self, name: str, rows: Mapping[int, int] | Sequence[int]) -> None:
        for row in rows:
            if row not in self._histories:
                there = ", ".join(map(str, self.rows)) or "none"
                raise EngineError(f"{name}: row {row}: expected one that is taken ({there}), got one that left or never joined; join first")

    def _require_places(self, name: str, count: int, taken: int) -> None:
        if taken + count > self.max_batch:
            held = f" beside {taken} there are" if taken else ""
            raise CapacityError(
                f"{name}: expected at most {self.max_batch} sequences, got {count}{held}; load with max_batch={taken + count}"
                f"{', or let one leave first' if taken else ''}"
            )

    def _require_prompts(self, name: str, prompts: Sequence[Sequence[int]]) -> None:
        if not prompts or not all(map(len, prompts)):
            raise EngineError(f"{name}: expected at least one token in each sequence, got {[len(prompt) for prompt in prompts]}")
        self._require_tokens(name, prompts)

    def _require_tokens(self, name: str, parts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> None:
        for place, part in enumerate(parts):
            wrong = [token for token in part if not 0 <= token < self.vocabulary]
            if wrong:
                row = place if rows is None else rows[place]
                raise EngineError(f"{name}: sequence {row}: expected tokens of 0 to {self.vocabulary - 1}, got {wrong[0]}")
