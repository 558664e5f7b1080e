"""The key/value cache: pages of tokens in one pool per layer, handed out to sequences as these grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.errors import CapacityError
from qcompile.ir.lowered import Buffer, Entry
from qcompile.ir.memory import dtype_of
from qcompile.ir.size import Size


def state_buffers(entry: Entry) -> list[Buffer]:
    """The cache buffers [P, L, R, D] of an entry, in the order of its inputs."""
    return [entry.buffers[name] for name in entry.inputs if entry.buffers[name].kind == "state"]


def _static(size: Size) -> int:
    assert isinstance(size, int)  # heads and head size: plan-memory makes only pages and page_tokens symbolic
    return size


class KVCache:
    """Rows of keys and values. Nothing is written beyond what `reserve` has granted, and it grants all or nothing.

    Attributes:
        tensors: buffer name -> [P, L, R, D]; zeros at first, because masked positions are multiplied by a weight of 0.
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
        affordable = max_context * self.max_batch if kv_bytes is None else kv_bytes // max(self.bytes_per_token, 1)
        if not page_tokens:
            return min(max_context, affordable // self.max_batch), self.max_batch
        wanted = self.max_batch * -(-max_context // page_tokens)
        return page_tokens, wanted if kv_bytes is None else min(wanted, affordable // page_tokens)

    def _allocate(self, state: Buffer, device: torch.device | str) -> Tensor:
        heads, size = _static(state.shape[1]), _static(state.shape[3])
        return torch.zeros((self.pages, heads, self.page_tokens, size), dtype=dtype_of(state.dtype), device=device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(_static(state.shape[1]) * _static(state.shape[3]) * dtype_of(state.dtype).itemsize for state in self._states)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_tokens * self.bytes_per_token

    @property
    def sizes(self) -> dict[str, int]:
        """The names that shapes of the plan use for the cache."""
        return {"pages": self.pages, "pages_per_sequence": self.pages_per_sequence, "page_tokens": self.page_tokens}

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
