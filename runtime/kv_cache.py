"""The key/value cache: pages of tokens in one pool per layer, shared by sequences as far as these are the same, and rows of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import CapacityError
from qcompile.ir.lowered import Buffer
from qcompile.ir.memory import dtype_of
from qcompile.ir.size import evaluate
from qcompile.runtime.cache_layout import CacheLayout, is_paged
from qcompile.runtime.cached_rows import CachedRows
from qcompile.runtime.huge_pages import huge_zeros


class KVCache(CachedRows):
    """Keys and values of rows in pages and rows of one memory.

    Attributes:
        tensors: buffer name -> [P, L, R, D] or [C, L, N, D]; zeros at first, because masked positions are multiplied by a weight of 0.
        page_table: int32 [max_batch, pages per sequence], what programs read: `bind` writes it, row after row of a batch.
        slots: int32 [max_batch], which row of the cache each row of a batch is; None where no token is kept in rows.
    """

    def __init__(self, layout: CacheLayout, device: torch.device | str = "cpu") -> None:
        """Allocate; all rows are empty.

        Raises:
            CapacityError: if the CPU has not that much memory.
        """
        super().__init__(layout)
        self.tensors = self._allocate(torch.device(device))
        self.page_table = torch.zeros(layout.max_batch, layout.pages_per_sequence, dtype=torch.int32, device=device)
        self.slots = torch.zeros(layout.max_batch, dtype=torch.int32, device=device) if layout.has_rows else None
        self._bound: list[list[int]] = [[] for _ in range(layout.max_batch)]
        self._numbers = [0] * layout.max_batch

    def _allocate(self, device: torch.device) -> dict[str, Tensor]:
        parts = {state.name: ([evaluate(size, self.sizes) for size in state.shape], dtype_of(state.dtype)) for state in self.layout.states}
        if device.type != "cpu":
            return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in parts.items()}
        try:
            return dict(zip(parts, huge_zeros(parts.values()), strict=True))
        except MemoryError as error:
            raise CapacityError(f"cache: {error}; load with a lower max_batch or max_context, or with kv_bytes") from None

    @property
    def sizes(self) -> dict[str, int]:
        """The names that shapes of the plan use for the cache."""
        return self.layout.sizes

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and rows, without the page tables."""
        return self.layout.page_bytes + self.layout.row_bytes

    def _separate(self, row: int, place: int) -> None:
        old, new = self._owned[row][place], self.pool.take()
        for state in filter(is_paged, self.layout.states):
            self.tensors[state.name][new].copy_(self.tensors[state.name][old])
        self.pool.release(old)
        self._owned[row][place] = new

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Let the empty row `target` begin with the first `length` tokens of `source`, all by default: pages are shared, rows copied."""
        length = self.lengths[source] if length is None else length
        self._owned[target] = self._owned[source][: self.layout.pages_for(length)]
        for page in self._owned[target]:
            self.pool.share(page)
        for state in self.layout.states:
            if not is_paged(state):
                self.tensors[state.name][target].copy_(self.tensors[state.name][source])
        self.lengths[target] = length

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """The tensors, and the inputs `page_table` and `slots` of a program for so many rows: all programs read the same memory."""
        slots = {} if self.slots is None else {"slots": self.slots[:batch]}
        return {**self.tensors, "page_table": self.page_table[:batch], **slots}

    def bind(self, rows: Sequence[int], batch: int | None = None) -> None:
        """Say that row i of the batch is row `rows[i]` of the cache; rows up to `batch` are padding, whose pages are never read."""
        padding = (batch or len(rows)) - len(rows)
        for place, pages in enumerate([*(self._owned[row] for row in rows), *[[]] * padding]):
            if self._bound[place] != pages:
                filled = [*pages, *[0] * (self.layout.pages_per_sequence - len(pages))]
                self.page_table[place].copy_(torch.tensor(filled, dtype=torch.int32, device="cpu"))
                self._bound[place] = list(pages)
        numbers = [*rows, *[0] * padding]
        if self.slots is not None and self._numbers[: len(numbers)] != numbers:
            self.slots[: len(numbers)].copy_(torch.tensor(numbers, dtype=torch.int32, device="cpu"))
            self._numbers[: len(numbers)] = numbers

    def read(self, row: int) -> dict[str, Tensor]:
        """What a row holds, on the CPU, whatever its pages: [L, T, D] of the T tokens in its pages, [L, H, D] of H in its rows."""
        return {state.name: self._read(state, row).to("cpu", copy=True).contiguous() for state in self.layout.states}

    def _read(self, state: Buffer, row: int) -> Tensor:
        tensor = self.tensors[state.name]
        if not is_paged(state):
            return tensor[row][:, self._held(state, self.lengths[row])]
        filled = self._filled(state, self.lengths[row])
        pages = self._owned[row][: -(-filled // self.layout.page_tokens)]
        return tensor[pages].transpose(0, 1).flatten(1, 2)[:, :filled]

    def _filled(self, state: Buffer, length: int) -> int:
        policy = self.layout.policy(state)
        return policy.page_slot(policy.settled(length))

    def _held(self, state: Buffer, length: int) -> list[int]:
        policy = self.layout.policy(state)
        return [policy.row(position) for position in policy.held(length)]

    def shapes(self, length: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of what `read` gives for a row of `length` tokens, by name."""
        found = {}
        for state in self.layout.states:
            _, heads, _, size = self.tensors[state.name].shape
            count = self._filled(state, length) if is_paged(state) else len(self._held(state, length))
            found[state.name] = dtype_of(state.dtype), [heads, count, size]
        return found

    def write(self, row: int, length: int, stored: Mapping[str, Tensor]) -> None:
        """Let the empty row hold what `read` gave for a sequence of `length` tokens, here or in a cache with other pages.

        Raises:
            CapacityError: if it does not fit; then nothing has changed.
        """
        self.reserve([length], [row])
        for state in self.layout.states:
            tensor, given = self.tensors[state.name], stored[state.name].to(self.tensors[state.name].device)
            if is_paged(state):
                size = self.layout.page_tokens
                for place, page in enumerate(self._owned[row]):
                    part = given[:, place * size : (place + 1) * size]
                    tensor[page, :, : part.shape[1]] = part
            else:
                tensor[row][:, self._held(state, length)] = given
        self.advance([length], [row])
