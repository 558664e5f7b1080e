"""A cache whose rows lie each in one piece, as runtimes want it that take a past and give a present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.runtime.cache_layout import CacheLayout
from qcompile.runtime.cached_rows import CachedRows


@dataclass(frozen=True)
class Part:
    """One tensor of the past, [1, L, T, D]: codes, scales or numbers of one layer's keys or values."""

    name: str
    dtype: torch.dtype
    heads: int
    size: int

    def elements(self, tokens: int) -> int:
        """Of so many tokens."""
        return self.heads * tokens * self.size


class DenseCache(CachedRows):
    """Rows of tensors [1, L, T, D]. Pages only count what may be held: a row has memory for all tokens of its pages, shared with nobody.

    Either the present is written where the past lies (`shared`): then tensors have room for more tokens than there are. Or past and present
    are tensors of exactly their tokens, and one spare set of memory takes the present of whichever row runs next.

    Attributes:
        parts: tensors of a row.
        shared: whether past and present are one.
    """

    def __init__(self, layout: CacheLayout, parts: Sequence[Part], *, shared: bool) -> None:
        """All rows are empty and have no memory."""
        super().__init__(layout)
        self.parts, self.shared = tuple(parts), shared
        self._rows: list[dict[str, Tensor]] = [{} for _ in range(layout.max_batch)]  # flat, unless past and present are one
        self._laid = [0] * layout.max_batch
        self._spare: dict[str, Tensor] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes that rows have."""
        return sum(flat.nbytes for row in self._rows for flat in row.values())

    @property
    def spare_bytes(self) -> int:
        """Bytes for the next present."""
        return sum(flat.nbytes for flat in self._spare.values())

    def room(self, row: int) -> int:
        """Tokens that a row has memory for, or will have once it runs."""
        return len(self._owned[row]) * self.layout.page_tokens

    def past(self, row: int) -> dict[str, Tensor]:
        """What a row holds, [1, L, T, D]: T is its length, or its room where past and present are one; then the mapping stays the same."""
        self._make_room(row)
        return self._rows[row] if self.shared else self._views(self._rows[row], self.lengths[row])

    def present(self, row: int, count: int) -> dict[str, Tensor]:
        """Where the past and `count` more tokens are to be written, which `reserve` has granted; `keep` once they are."""
        if self.shared:
            return self.past(row)
        for part in self.parts:
            wanted = part.elements(self.room(row))
            if part.name not in self._spare or self._spare[part.name].numel() < wanted:
                self._spare[part.name] = torch.zeros(wanted, dtype=part.dtype)
        return self._views(self._spare, self.lengths[row] + count)

    def keep(self, row: int, count: int) -> None:
        """Let the present with `count` more tokens be the row's memory; `advance` counts them."""
        if not self.shared:
            self._rows[row], self._spare = self._spare, self._rows[row]
            self._laid[row] = self.lengths[row] + count

    def _views(self, flat: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        return {
            part.name: flat[part.name][: part.elements(tokens)].view(1, part.heads, tokens, part.size)
            for part in self.parts
        }  # fmt: skip

    def _make_room(self, row: int) -> None:
        """Memory for the tokens of a row's pages, with what it holds as it is laid out now."""
        held, length = self._rows[row], self.lengths[row]
        if self.shared:
            before = next((tensor.shape[2] for tensor in held.values()), 0)
            if before < self.room(row):
                self._lay(row, before, self.room(row), min(before, length))
        elif not held or self._laid[row] != length:  # a run that was given up may have left more
            self._lay(row, self._laid[row], length, min(self._laid[row], length))
            self._laid[row] = length

    def _lay(self, row: int, before: int, after: int, kept: int) -> None:
        """The first `kept` tokens again in tensors of `after` tokens."""
        held = self._rows[row]
        old = {} if not before else held if self.shared else self._views(held, before)
        flat = {part.name: torch.zeros(max(1, part.elements(after)), dtype=part.dtype) for part in self.parts}
        new = self._views(flat, after)
        for name in old:
            new[name][:, :, :kept] = old[name][:, :, :kept]
        self._rows[row] = new if self.shared else flat

    def require_new(self, lengths: Sequence[int], shared: Sequence[int] = (), *, keeping: bool = True) -> None:
        """As for other caches; what sequences have in common is held by each."""
        del shared
        super().require_new(lengths, keeping=keeping)

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Let the empty row `target` begin with a copy of the first `length` tokens of `source`, all by default.

        Raises:
            CapacityError: if there are not enough pages; then nothing has changed.
        """
        length = self.lengths[source] if length is None else length
        past = self.past(source)
        self.write(target, length, {name: tensor[0, :, :length] for name, tensor in past.items()})

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the sequences in `rows`, all by default, and their memory."""
        super().reset(rows)
        for row in range(self.max_batch) if rows is None else rows:
            self._rows[row], self._laid[row] = {}, 0

    def read(self, row: int) -> dict[str, Tensor]:
        """A copy of what a row holds, [L, T, D] by name."""
        return {name: tensor[0, :, : self.lengths[row]].clone() for name, tensor in self.past(row).items()}

    def shapes(self, length: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of what `read` gives for a row of `length` tokens, by name."""
        return {part.name: (part.dtype, [part.heads, length, part.size]) for part in self.parts}

    def write(self, row: int, length: int, stored: Mapping[str, Tensor]) -> None:
        """Let the empty row hold what `read` gave for a sequence of `length` tokens.

        Raises:
            CapacityError: if it does not fit; then nothing has changed.
        """
        self.reserve([length], [row])
        self.advance([length], [row])
        for name, tensor in self.past(row).items():
            tensor[0, :, :length] = stored[name]
