"""The key/value cache: pages of tokens in one pool per layer, handed out to sequences as these grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import CapacityError
from qcompile.ir.lowered import Buffer, Entry
from qcompile.ir.memory import dtype_of
from qcompile.ir.size import evaluate


def state_buffers(entry: Entry) -> list[Buffer]:
    """The cache buffers of an entry, in the order of its inputs: pages [P, L, R, D], and rows of sequences [C, L, N, D]."""
    return [entry.buffers[name] for name in entry.inputs if entry.buffers[name].kind == "state"]


def is_paged(state: Buffer) -> bool:
    """Whether it holds pages; else it holds rows of each sequence."""
    return state.shape[0] == "pages"


def bytes_of(states: Iterable[Buffer], sizes: Mapping[str, int]) -> int:
    """Bytes of cache buffers where the names in their shapes stand for `sizes`."""
    return sum(math.prod(evaluate(size, sizes) for size in state.shape) * dtype_of(state.dtype).itemsize for state in states)


class KVCache:
    """Rows of keys and values. Nothing is written beyond what `reserve` has granted, and it grants all or nothing.

    Attributes:
        tensors: buffer name -> [P, L, R, D] or [C, L, N, D]; zeros at first, because masked positions are multiplied by a weight of 0.
        max_batch: rows.
        capacity: the most tokens of a row.
        page_tokens: R; equal to `capacity` where a sequence is one page.
        lengths: tokens that each row holds.
    """

    def __init__(
        self, states: Sequence[Buffer], *, max_batch: int, max_context: int, page_tokens: int = 0, kv_bytes: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """Allocate for `max_batch` rows of `max_context` tokens, or for what fits into `kv_bytes`.

        Raises:
            CapacityError: if there is no room for a single token per row.
        """
        self._states = tuple(states)
        self.max_batch = max_batch
        self.page_tokens, pages = self._layout(max_context, page_tokens, kv_bytes) if max_batch > 0 else (0, 0)
        if self.page_tokens < 1 or pages < max(max_batch, 1):
            raise CapacityError(
                f"cache: expected room for at least a page of {max(self.page_tokens, 1)} tokens in each of {max_batch} rows, "
                f"got {kv_bytes if kv_bytes is not None else max_context} {'bytes' if kv_bytes is not None else 'tokens'} at "
                f"{self.bytes_per_token} bytes per token; raise kv_bytes or max_context, or lower max_batch or page_tokens"
            )
        self.capacity = min(max_context, pages * page_tokens if page_tokens else self.page_tokens)
        self.pages_per_sequence = -(-self.capacity // self.page_tokens)
        self.pages = pages
        self.lengths = [0] * max_batch
        self._free = list(range(pages - 1, -1, -1))
        self._owned: list[list[int]] = [[] for _ in range(max_batch)]
        self.tensors = {state.name: self._allocate(state, device) for state in self._states}

    def _layout(self, max_context: int, page_tokens: int, kv_bytes: int | None) -> tuple[int, int]:
        """Tokens of a page and the number of pages: one page per row where `page_tokens` is 0."""
        for_pages = 0 if kv_bytes is None else max(0, kv_bytes - self.max_batch * self.bytes_per_sequence)
        affordable = max_context * self.max_batch if kv_bytes is None else for_pages // max(self.bytes_per_token, 1)
        if not page_tokens:
            return min(max_context, affordable // self.max_batch), self.max_batch
        wanted = self.max_batch * -(-max_context // page_tokens)
        return page_tokens, wanted if kv_bytes is None else min(wanted, affordable // page_tokens)

    def _allocate(self, state: Buffer, device: torch.device | str) -> Tensor:
        shape = [evaluate(size, self.sizes) for size in state.shape]
        return torch.zeros(shape, dtype=dtype_of(state.dtype), device=device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in the pages of all layers."""
        return bytes_of(self._states, {"pages": 1, "page_tokens": 1, "sequences": 0})

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of one sequence beside its pages: the tokens that are kept as they came."""
        return bytes_of(self._states, {"pages": 0, "page_tokens": 0, "sequences": 1})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return bytes_of(self._states, self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """The names that shapes of the plan use for the cache."""
        paged = {"pages": self.pages, "pages_per_sequence": self.pages_per_sequence, "page_tokens": self.page_tokens}
        return paged if all(map(is_paged, self._states)) else {**paged, "sequences": self.max_batch}

    def require(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Check that `tokens[i]` more tokens fit into row `rows[i]`, for all i at once; changes nothing.

        Raises:
            CapacityError: naming what is asked for and what there is, and the remedy.
        """
        wanted = 0
        for row, count in zip(rows, tokens, strict=True):
            if not 0 <= row < self.max_batch:
                raise CapacityError(f"row {row}: expected at most {self.max_batch} sequences at once; load with max_batch={row + 1}")
            length = self.lengths[row] + count
            if length > self.capacity:
                held = f" after {self.lengths[row]} held" if self.lengths[row] else ""
                raise CapacityError(
                    f"sequence {row}: expected at most {self.capacity} tokens, the capacity of the cache, got {count}{held}; load "
                    f"with max_context={length} or more, or shorten the prompt"
                )
            wanted += max(0, -(-length // self.page_tokens) - len(self._owned[row]))
        if wanted > len(self._free):
            raise CapacityError(
                f"cache: expected at most {len(self._free)} more pages of {self.page_tokens} tokens, got a demand for "
                f"{wanted}; raise kv_bytes, or run fewer sequences at once"
            )

    def reserve(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Give each row the pages for `tokens[i]` more tokens; `advance` after they are written.

        Raises:
            CapacityError: as `require`; then nothing has changed.
        """
        self.require(tokens, rows)
        for row, count in zip(rows, tokens, strict=True):
            while len(self._owned[row]) * self.page_tokens < self.lengths[row] + count:
                self._owned[row].append(self._free.pop())

    def advance(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Count `tokens[i]` tokens as written to row `rows[i]`."""
        for row, count in zip(rows, tokens, strict=True):
            self.lengths[row] += count

    def table(self, rows: Sequence[int]) -> list[list[int]]:
        """The pages of each row, padded with page 0, which is never read there: `pages_per_sequence` of them."""
        return [self._owned[row] + [0] * (self.pages_per_sequence - len(self._owned[row])) for row in rows]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the sequences in `rows`, all by default; their pages are free again."""
        for row in range(self.max_batch) if rows is None else rows:
            self._free.extend(reversed(self._owned[row]))
            self._owned[row] = []
            self.lengths[row] = 0
        self._free.sort(reverse=True)
