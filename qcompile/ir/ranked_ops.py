"""A cache whose tokens are packed finely or coarsely by the attention that they have received.

Shape letters as in `qcompile/ir/retention_ops.py`: B batch, S tokens of this call, H query heads, L key/value heads, D head size, P pages,
R tokens in a page, W bytes of a packed vector, N rows of unsettled tokens, C sequences that the cache serves, T tokens of a sequence.

A token is kept as it came until its group settles. Meanwhile the weights that queries give it are added up; divided by the number of
queries that saw it, they are its saliency (ZipCache, arXiv:2405.14256), here the mean over the query heads that share a key. A query
counts from the token's own step to the last one before the group settles, so that what is fine depends on the sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.ir.cache_ops import turned
from qcompile.ir.ops import attention_weights, define
from qcompile.ir.retention_ops import Arrivals, as_they_came, page_rows, sequences, visible
from qcompile.quant.packing import pack, packed_bytes, unpack
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format
from qcompile.quant.vectors.ranked import RankedFormat

_ARGUMENTS = (
    "Tensor exact_keys, Tensor exact_values, Tensor slots, Tensor page_table, Tensor positions, str k_form, str v_form, "
    "int first, int recent, int group, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? inv_freq=None, float scaling=1.0"
)


@dataclass
class _Row:
    """One sequence of a call, as its queries go by.

    Attributes:
        arrivals: its tokens.
        policy: when they settle.
        forms: of keys and values.
        pages: of keys, values [P, L, R, W] and marks [P, 1, R, ceil(L/8)], written in place.
        table: its pages.
        vectors: keys and values as they came and, behind them, as they are read once they are packed [L, 2 T, D].
        received: weights that unsettled tokens were given so far [L, T].
    """

    arrivals: Arrivals
    policy: Retention
    forms: tuple[RankedFormat, RankedFormat]
    pages: tuple[Tensor, Tensor, Tensor]
    table: Tensor
    vectors: list[Tensor]
    received: Tensor

    def read(self, tokens: range) -> None:
        """Unpack tokens that have settled."""
        page, row = page_rows(self.table, self.policy, tokens, self.pages[0].shape[2])
        marks = unpack(self.pages[2][page, 0, row], 1, len(self.received)).bool().T
        for form, pages, vectors in zip(self.forms, self.pages, self.vectors, strict=False):
            packed = pages[page, :, row].transpose(0, 1)
            place = slice(self.arrivals.end + tokens.start, self.arrivals.end + tokens.stop)
            vectors[:, place] = form.decode(packed, vectors.shape[2], vectors.dtype, (marks,))

    def settle(self, tokens: range, query: int, window: int) -> None:
        """Pack a group, those of the highest saliency in the fine form; `query` is the first that reads it so."""
        seen = query - torch.arange(tokens.start, tokens.stop, device=self.received.device)
        saliency = self.received[:, tokens.start : tokens.stop] / (seen.clamp(max=window) if window else seen)
        best = saliency.argsort(dim=1, descending=True, stable=True)[:, : self.forms[0].salient]
        marks = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, best, value=True)
        page, row = page_rows(self.table, self.policy, tokens, self.pages[0].shape[2])
        self.pages[2][page, 0, row] = pack(marks.T.to(torch.uint8), 1)
        for form, pages, vectors in zip(self.forms, self.pages, self.vectors, strict=False):
            pages[page, :, row] = form.encode(vectors[:, tokens.start : tokens.stop], (marks,)).transpose(0, 1)
        self.read(tokens)

    def runs(self) -> Iterator[tuple[range, int]]:
        """Positions of queries that read the same tokens packed, and where these end."""
        position, end = self.arrivals.start, self.arrivals.end
        while position < end:
            border, start = self.policy.settled(position + 1), position
            while position < end and self.policy.settled(position + 1) == border:
                position += 1
            yield range(start, position), border


@dataclass(frozen=True)
class _Options:
    """How queries look at keys."""

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    inv_freq: Tensor | None
    scaling: float


def _attend_row(row: _Row, queries: Tensor, options: _Options) -> Tensor:
    """Queries [1, H, S', D] of a sequence, run after run: [H, S', D]."""
    policy, start, end = row.policy, row.arrivals.start, row.arrivals.end
    settled = policy.settled(start)
    if settled > policy.first:
        row.read(range(policy.first, settled))
    keep = visible(policy, row.arrivals, options.window, queries.device)
    result = []
    for run, border in row.runs():
        if border > settled:
            row.settle(range(settled, border), run.start, options.window)
            settled = border
        mine = slice(run.start - start, run.stop - start)
        keys = row.vectors[0].unsqueeze(0)
        if options.inv_freq is not None:
            keys = torch.cat([turned(part, options.inv_freq, options.scaling) for part in keys.chunk(2, dim=2)], dim=2)
        seen_by = (None, options.scale, options.softcap, options.sinks)
        weights = attention_weights(queries[:, :, mine], keys, keep[:, :, mine], *seen_by)[0]
        weights = weights.view(len(row.received), -1, *weights.shape[1:])
        row.received += weights[..., :end].mean(1).sum(1)
        result.append(torch.matmul(weights, row.vectors[1].unsqueeze(1)).flatten(0, 1))
    return torch.cat(result, dim=1)


def _attend(
    q: Tensor, pages: tuple[Tensor, Tensor, Tensor], saliency: Tensor, exact_keys: Tensor, exact_values: Tensor,
    slots: Tensor, page_table: Tensor, positions: Tensor, forms: tuple[str, str], policy: Retention, options: _Options,
) -> Tensor:  # fmt: skip
    """The attention; pages of keys, values and marks, and saliency, are written in place."""
    ranked = [form for form in map(vector_format, forms) if isinstance(form, RankedFormat)]
    if len(ranked) != len(forms) or policy.recent < 1:
        raise FormatError(
            f"attend_ranked: expected two ranked formats and a window of at least a token, got {forms[0]!r}, {forms[1]!r} and "
            f"{policy.recent}; choose kv4-zip, or set cache_window"
        )
    result = torch.zeros(q.shape[0], q.shape[2], q.shape[1], exact_values.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    for arrivals in sequences(positions):
        exact = [as_they_came(x[arrivals.row], arrivals, policy, q.dtype) for x in (exact_keys, exact_values)]
        rows, held = saliency[int(slots[arrivals.row])], policy.held(arrivals.start)
        received = exact[0].new_zeros(exact[0].shape[0], arrivals.end)
        received[:, held] = rows[:, [policy.row(position) for position in held], 0].to(received.dtype)
        row = _Row(arrivals, policy, (ranked[0], ranked[1]), pages, page_table[arrivals.row], exact, received)
        queries = q[arrivals.row : arrivals.row + 1, :, arrivals.places]
        result[arrivals.row][:, arrivals.places] = _attend_row(row, queries, options).to(q.dtype)
        kept = policy.held(arrivals.end)
        rows[:, [policy.row(position) for position in kept], 0] = received[:, kept].to(rows.dtype)
    return result


def marks_width(heads: int) -> int:
    """Bytes that say in which form a token of `heads` heads is stored."""
    return packed_bytes(heads, 1)


def _fake_out(q: Tensor, exact_values: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], exact_values.shape[3])).transpose(1, 2)


def _fake_attend_ranked(
    q: Tensor, keys: Tensor, values: Tensor, marks: Tensor, saliency: Tensor, exact_keys: Tensor, exact_values: Tensor,
    *_: object, **__: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    del exact_keys
    return _fake_out(q, exact_values), *(torch.empty_like(state) for state in (keys, values, marks, saliency))


@define(
    f"attend_ranked(Tensor q, Tensor keys, Tensor values, Tensor marks, Tensor saliency, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_attend_ranked,
)
def attend_ranked(
    q: Tensor, keys: Tensor, values: Tensor, marks: Tensor, saliency: Tensor, exact_keys: Tensor, exact_values: Tensor,
    slots: Tensor, page_table: Tensor, positions: Tensor, k_form: str, v_form: str, first: int, recent: int, group: int,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    inv_freq: Tensor | None = None, scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of q [B, H, S, D] where tokens settle, step by step, in the form that the attention so far has earned them.

    keys, values uint8 [P, L, R, W] are what has settled before, marks uint8 [P, 1, R, ceil(L/8)] a bit for each head that is set where its
    token is fine, saliency [C, L, N, 1] the attention that unsettled tokens have been given; all four come back as they are
    afterwards. exact_keys, exact_values [B, L, N + S, D] are what `with_recent` gave. Options as `attend_settled`.

    Raises:
        FormatError: for forms that are not ranked, or a window of 0, in which a token would be judged before anyone has seen it.
    """
    pages, saliency = (keys.clone(), values.clone(), marks.clone()), saliency.clone()
    options = _Options(scale, window, softcap, sinks, inv_freq, scaling)
    policy = Retention(first, recent, group)
    out = _attend(
        q, pages, saliency, exact_keys, exact_values, slots, page_table, positions, (k_form, v_form), policy, options
    )  # fmt: skip
    return out, *pages, saliency


@define(
    f"attend_ranked_(Tensor q, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) marks, Tensor(d!) saliency, {_ARGUMENTS}) -> Tensor",
    lambda q, keys, values, marks, saliency, exact_keys, exact_values, *_, **__: _fake_out(q, exact_values),
)
def attend_ranked_(
    q: Tensor, keys: Tensor, values: Tensor, marks: Tensor, saliency: Tensor, exact_keys: Tensor, exact_values: Tensor,
    slots: Tensor, page_table: Tensor, positions: Tensor, k_form: str, v_form: str, first: int, recent: int, group: int,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
    inv_freq: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """`attend_ranked` in place."""
    options = _Options(scale, window, softcap, sinks, inv_freq, scaling)
    policy = Retention(first, recent, group)
    pages = (keys, values, marks)
    return _attend(q, pages, saliency, exact_keys, exact_values, slots, page_table, positions, (k_form, v_form), policy, options)
