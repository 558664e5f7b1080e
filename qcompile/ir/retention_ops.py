"""Caches that keep some tokens as they came: what has settled lies packed in pages, the rest in rows of the sequence.

Shape letters: B batch, S tokens of this call, H query heads, L key/value heads, D head size, P pages, R tokens in a page, W bytes of a
packed vector, N rows of unsettled tokens (`quant/retention.py`), C sequences that the cache serves. `slots` int32 [B] says which of the C
each row of the batch is; `positions` [B, S] count on from what the cache holds, padding is -1, anywhere.

One step of a layer is `with_recent`, `settle`, `retain` for keys and for values, then `attend_settled`. Everything is rounded to the rows'
dtype first, so that a token is the same number whether it came in this call or before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.cache_ops import ON_READ, turned
from qcompile.ir.ops import define, masked_attention, working_dtype
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format

POLICY = "int first, int recent, int group"
"""Arguments that say which tokens settle."""


@dataclass(frozen=True)
class Arrivals:
    """A row of the batch: tokens `start` to `end` come in this call, at `places` among the row's S."""

    row: int
    start: int
    end: int
    places: list[int]

    def rows(self, policy: Retention, positions: Iterable[int]) -> list[int]:
        """Where unsettled tokens stand in what `with_recent` gives."""
        return [
            policy.rows + self.places[position - self.start] if position >= self.start else policy.row(position) for position in positions
        ]


def sequences(positions: Tensor) -> Iterator[Arrivals]:
    """What comes for each row of `positions` [B, S], but for rows of padding alone."""
    for row, places in enumerate(positions.tolist()):
        real = [index for index, position in enumerate(places) if position >= 0]
        if real:
            yield Arrivals(row, places[real[0]], places[real[-1]] + 1, real)


def _fake_with_recent(rows: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    del slots
    return x.new_empty((x.shape[0], x.shape[1], rows.shape[2] + x.shape[2], x.shape[3]), dtype=rows.dtype)


@define("with_recent(Tensor rows, Tensor x, Tensor slots) -> Tensor", _fake_with_recent)
def with_recent(rows: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    """The unsettled tokens of each sequence, rows [C, L, N, D], then the new ones, x [B, L, S, D]: [B, L, N + S, D] as the rows' dtype."""
    return torch.cat((rows[slots.long()], x.to(rows.dtype)), dim=2)


def _like_first(first: Tensor, *_: object) -> Tensor:
    return torch.empty_like(first)


def _settle(
    pages: Tensor, exact: Tensor, page_table: Tensor, positions: Tensor, form: str, policy: Retention, tables: Sequence[Tensor] | None
) -> None:  # fmt: skip
    for sequence in sequences(positions):
        settling = range(policy.settled(sequence.start), policy.settled(sequence.end))
        if settling:
            packed = vector_format(form).encode(exact[sequence.row][:, sequence.rows(policy, settling)], tables or ())
            page, row = page_rows(page_table[sequence.row], policy, settling, pages.shape[2])
            pages[page, :, row] = packed.transpose(0, 1)


def page_rows(table: Tensor, policy: Retention, positions: range, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Physical page and row of settled tokens through their sequence's `table` [pages]."""
    slots = torch.arange(policy.page_slot(positions.start), policy.page_slot(positions.stop), device=table.device)
    return table.long()[slots // page_tokens], slots % page_tokens


@define(
    f"settle(Tensor pages, Tensor exact, Tensor page_table, Tensor positions, str form, {POLICY}, Tensor[]? tables=None) -> Tensor",
    _like_first,
)
def settle(
    pages: Tensor, exact: Tensor, page_table: Tensor, positions: Tensor, form: str, first: int, recent: int, group: int,
    tables: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The pages [P, L, R, W] with the tokens that settle in this call packed; `exact` [B, L, N + S, D] is what `with_recent` gave."""
    pages = pages.clone()
    _settle(pages, exact, page_table, positions, form, Retention(first, recent, group), tables)
    return pages


@define(
    f"settle_(Tensor(a!) pages, Tensor exact, Tensor page_table, Tensor positions, str form, {POLICY}, Tensor[]? tables=None) -> ()",
    lambda *_: None,
)
def settle_(
    pages: Tensor, exact: Tensor, page_table: Tensor, positions: Tensor, form: str, first: int, recent: int, group: int,
    tables: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """`settle` in place."""
    _settle(pages, exact, page_table, positions, form, Retention(first, recent, group), tables)


def _retain(rows: Tensor, exact: Tensor, slots: Tensor, positions: Tensor, policy: Retention) -> None:
    for sequence in sequences(positions):
        kept = [position for position in policy.held(sequence.end) if position >= sequence.start]
        mine = rows[int(slots[sequence.row])]
        mine[:, [policy.row(position) for position in kept]] = exact[sequence.row][:, sequence.rows(policy, kept)]


@define(f"retain(Tensor rows, Tensor exact, Tensor slots, Tensor positions, {POLICY}) -> Tensor", _like_first)
def retain(rows: Tensor, exact: Tensor, slots: Tensor, positions: Tensor, first: int, recent: int, group: int) -> Tensor:
    """The rows [C, L, N, D] with the new tokens that do not settle in this call."""
    rows = rows.clone()
    _retain(rows, exact, slots, positions, Retention(first, recent, group))
    return rows


@define(f"retain_(Tensor(a!) rows, Tensor exact, Tensor slots, Tensor positions, {POLICY}) -> ()", lambda *_: None)
def retain_(rows: Tensor, exact: Tensor, slots: Tensor, positions: Tensor, first: int, recent: int, group: int) -> None:
    """`retain` in place."""
    _retain(rows, exact, slots, positions, Retention(first, recent, group))


def _fake_attend_settled(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


@define(
    "attend_settled(Tensor q, Tensor keys, Tensor values, Tensor exact_keys, Tensor exact_values, Tensor page_table, Tensor positions, "
    f"str k_form, str v_form, {POLICY}, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, {ON_READ}) -> Tensor",
    _fake_attend_settled,
)
def attend_settled(
    q: Tensor, keys: Tensor, values: Tensor, exact_keys: Tensor, exact_values: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, first: int, recent: int, group: int,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    k_tables: Sequence[Tensor] | None = None, v_tables: Sequence[Tensor] | None = None,
    inv_freq: Tensor | None = None, scaling: float = 1.0, products: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [B, H, S, D] where each query sees the cache as it stands at its own step: tokens that have settled by then packed.

    keys, values [P, L, R, W] are what `settle` gave, exact_keys, exact_values [B, L, N + S, D] what `with_recent` gave. Options as
    `cache_attend_packed`; a padding query gives 0.
    """
    del products
    policy = Retention(first, recent, group)
    result = torch.zeros_like(q.transpose(1, 2).contiguous()).transpose(1, 2)
    for sequence in sequences(positions):
        stored = ((keys, exact_keys, k_form, k_tables), (values, exact_values, v_form, v_tables))
        k, v = (
            as_stored(pages, exact[sequence.row], page_table[sequence.row], form, tables, sequence, policy, q.dtype)
            for pages, exact, form, tables in stored
        )
        k = torch.cat([turned(part, inv_freq, scaling) for part in k.chunk(2, dim=2)], dim=2) if inv_freq is not None else k
        keep = visible(policy, sequence, window, q.device)
        queries = q[sequence.row : sequence.row + 1, :, sequence.places]
        result[sequence.row][:, sequence.places] = masked_attention(queries, k, v, keep, None, scale, softcap, sinks)[0]
    return result


def as_stored(
    pages: Tensor, exact: Tensor, table: Tensor, form: str, tables: Sequence[Tensor] | None, sequence: Arrivals, policy: Retention,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A sequence's vectors as they came, then as they were packed: [1, L, 2 T, D]; 0 where there is none of the kind."""
    result = as_they_came(exact, sequence, policy, dtype)
    settled = range(policy.first, policy.settled(sequence.end))
    if settled:
        page, row = page_rows(table, policy, settled, pages.shape[2])
        packed = pages[page, :, row].transpose(0, 1)
        result[:, sequence.end + settled.start : sequence.end + settled.stop] = vector_format(form).decode(
            packed, exact.shape[2], result.dtype, tables or ()
        )
    return result.unsqueeze(0)


def as_they_came(exact: Tensor, sequence: Arrivals, policy: Retention, dtype: torch.dtype) -> Tensor:
    """A sequence's vectors that had not settled before this call, from `exact` [L, N + S, D], and room for packed ones: [L, 2 T, D]."""
    result = torch.zeros(exact.shape[0], 2 * sequence.end, exact.shape[2], dtype=working_dtype(dtype), device=exact.device)
    unsettled = [*policy.held(sequence.start), *range(sequence.start, sequence.end)]
    result[:, unsettled] = exact[:, sequence.rows(policy, unsettled)].to(result.dtype)
    return result


def visible(policy: Retention, sequence: Arrivals, window: int, device: torch.device) -> Tensor:
    """Which of a sequence's vectors, as they came and then packed, each new query sees: [1, 1, S', 2 T]."""
    row = torch.arange(sequence.start, sequence.end, device=device).unsqueeze(1)
    column = torch.arange(sequence.end, device=device)
    border = torch.tensor([policy.settled(position + 1) for position in range(sequence.start, sequence.end)], device=device).unsqueeze(1)
    packed = (column >= policy.first) & (column < border)
    seen = column <= row
    if window:
        seen = seen & (column > row - window)
    return torch.cat((seen & ~packed, seen & packed), dim=1).view(1, 1, len(row), -1)
