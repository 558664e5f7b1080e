"""What rows of a cache hold, counted in pages: what is granted, and what is refused before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import CapacityError
from qcompile.runtime.cache_layout import CacheLayout
from qcompile.runtime.page_pool import PagePool


class CachedRows:
    """Sequences in rows. A subclass has the memory: nothing is written beyond what `reserve` has granted, and it grants all or nothing.

    Attributes:
        layout: sizes.
        pool: pages.
        lengths: tokens that each row holds.
    """

    def __init__(self, layout: CacheLayout) -> None:
        """All rows are empty."""
        self.layout, self.pool = layout, PagePool(layout.pages)
        self.lengths = [0] * layout.max_batch
        self._owned: list[list[int]] = [[] for _ in range(layout.max_batch)]

    @property
    def max_batch(self) -> int:
        """Rows."""
        return self.layout.max_batch

    @property
    def capacity(self) -> int:
        """The most tokens of a row."""
        return self.layout.capacity

    def pages_of(self, row: int) -> list[int]:
        """The pages of a row in the order of its tokens."""
        return list(self._owned[row])

    def require(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Check that `tokens[i]` more tokens fit into row `rows[i]`, for all i at once; changes nothing.

        Raises:
            CapacityError: naming what is asked for and what there is, and the remedy.
        """
        self._demand(tokens, rows)

    def reserve(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Give each row pages of its own for `tokens[i]` more tokens; `advance` after they are written.

        A page that is about to be written and that others hold too is copied first: that is the one that is partly filled.

        Raises:
            CapacityError: as `require`; then nothing has changed.
        """
        for row, copied, fresh in self._demand(tokens, rows):
            for place in copied:
                self._separate(row, place)
            self._owned[row].extend(self.pool.take() for _ in range(fresh))

    def _demand(self, tokens: Sequence[int], rows: Sequence[int]) -> list[tuple[int, list[int], int]]:
        """For each row the places of pages to be copied, and how many new ones it needs."""
        demand, leaving = [], dict[int, int]()
        for row, count in zip(rows, tokens, strict=True):
            self._require_length(row, count)
            owned = self._owned[row]
            copied = [place for place in self._written(row, count) if self.pool.holders(owned[place]) - leaving.get(owned[place], 0) > 1]
            leaving |= {owned[place]: leaving.get(owned[place], 0) + 1 for place in copied}
            demand.append((row, copied, max(0, self.layout.pages_for(self.lengths[row] + count) - len(owned))))
        self._require_pages(sum(len(copied) + fresh for _, copied, fresh in demand), self.pool.free)
        return demand

    def _written(self, row: int, count: int) -> range:
        """Places of the pages it has that `count` more tokens write to."""
        first, stop = self.layout.next_slot(self.lengths[row]), self.layout.slots(self.lengths[row] + count)
        size = self.layout.page_tokens
        return range(first // size, min(len(self._owned[row]), -(-stop // size))) if count and stop > first else range(0)

    def require_new(self, lengths: Sequence[int], shared: Sequence[int] = (), *, keeping: bool = True) -> None:
        """Check that new sequences of so many tokens fit, of which the first `shared[i]` are others' too; changes nothing.

        `keeping` says that the sequences there are stay; else they are taken to have left.

        Raises:
            CapacityError: naming what is asked for and what there is, and the remedy.
        """
        for index, length in enumerate(lengths):
            self._require_length(index, length, new=True)
        wanted = sum(map(self.layout.pages_for, lengths)) - sum(map(self.layout.whole_pages, shared))
        self._require_pages(wanted, self.pool.free if keeping else self.layout.pages)

    def _require_length(self, row: int, count: int, *, new: bool = False) -> None:
        held = 0 if new else self.lengths[row]
        if held + count > self.capacity:
            raise CapacityError(
                f"sequence {row}: expected at most {self.capacity} tokens, the capacity of the cache, got {count}"
                f"{f' after {held} held' if held else ''}; load with max_context={held + count} or more (and kv_bytes to match), or "
                "shorten the prompt"
            )

    def _require_pages(self, wanted: int, free: int) -> None:
        if wanted > free:
            raise CapacityError(
                f"cache: expected at most {free} more pages of {self.layout.page_tokens} tokens, got a demand for {wanted}; raise "
                "kv_bytes, or run fewer sequences at once"
            )

    def advance(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Count `tokens[i]` tokens as written to row `rows[i]`."""
        for row, count in zip(rows, tokens, strict=True):
            self.lengths[row] += count

    def shareable(self, row: int, length: int) -> int:
        """The most of the first `length` tokens of a row that a fork can begin with: all that is needed after them is still held."""
        held = self.lengths[row]
        return next(count for count in range(min(length, held), -1, -1) if count == 0 or self.layout.keeps(held, count))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the sequences in `rows`, all by default; pages that nobody else holds are free again."""
        for row in range(self.max_batch) if rows is None else rows:
            for page in self._owned[row]:
                self.pool.release(page)
            self._owned[row] = []
            self.lengths[row] = 0

    def _separate(self, row: int, place: int) -> None:
        """Give a row a copy of a page that others hold too."""
        raise NotImplementedError

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Let the empty row `target` begin with the first `length` tokens of `source`, all by default."""
        raise NotImplementedError

    def read(self, row: int) -> dict[str, Tensor]:
        """What a row holds, on the CPU, wherever it lies: [L, T, D] by name."""
        raise NotImplementedError

    def shapes(self, length: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of what `read` gives for a row of `length` tokens, by name."""
        raise NotImplementedError

    def write(self, row: int, length: int, stored: Mapping[str, Tensor]) -> None:
        """Let the empty row hold what `read` gave for a sequence of `length` tokens.

        Raises:
            CapacityError: if it does not fit; then nothing has changed.
        """
        raise NotImplementedError
