"""Caches that keep some tokens as they came: whatever the chunks, each query sees what decoding would have seen."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.ir.ops import masked_attention
from qcompile.ir.retention_ops import attend_settled, retain, settle, with_recent
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format

HEADS, SHARED, SIZE, PAGE = 4, 2, 8, 8
POLICIES = [Retention(2, 0, 1), Retention(0, 3, 1), Retention(0, 0, 4), Retention(3, 2, 4), Retention(1, 5, 2), Retention(4, 1, 8)]


def vectors(batch: int, heads: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(batch, heads, tokens, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Cache:
    """One layer's state for `sequences`, and its step."""

    def __init__(self, policy: Retention, forms: tuple[str, str], sequences: int, dtype: torch.dtype = torch.float64) -> None:
        self.policy, self.forms = policy, forms
        self.options = (policy.first, policy.recent, policy.group)
        pages = 6 * sequences
        self.pages = [torch.zeros(pages, SHARED, PAGE, vector_format(form).width(SIZE), dtype=torch.uint8) for form in forms]
        self.rows = [torch.full((sequences, SHARED, policy.rows, SIZE), torch.nan, dtype=dtype) for _ in forms]
        self.table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).view(sequences, 6).int()

    def step(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, **options: float) -> Tensor:
        table = self.table[slots.long()]
        exact = [with_recent(rows, x, slots) for rows, x in zip(self.rows, (k, v), strict=True)]
        self.pages = [
            settle(pages, x, table, positions, form, *self.options) for pages, x, form in zip(self.pages, exact, self.forms, strict=True)
        ]
        self.rows = [retain(rows, x, slots, positions, *self.options) for rows, x in zip(self.rows, exact, strict=True)]
        return attend_settled(q, *self.pages, *exact, table, positions, *self.forms, *self.options, 0.3, **options)


def forms_of(policy: Retention) -> tuple[str, str]:
    return (f"int4 t{policy.group} asym", "int3 g4 sym") if policy.group > 1 else ("int4 asym", "int3 g4 sym")


def by_definition(policy: Retention, q: Tensor, k: Tensor, v: Tensor, forms: tuple[str, str]) -> Tensor:
    """Token by token from the policy's sentence: groups that have settled are packed, all else is as it came."""
    results = []
    for step in range(q.shape[2]):
        seen = []
        for x, text in ((k, forms[0]), (v, forms[1])):
            part, end = x[:, :, : step + 1].clone(), policy.settled(step + 1)
            if end > policy.first:
                form = vector_format(text)
                part[:, :, policy.first : end] = form.decode(form.encode(part[:, :, policy.first : end]), SIZE, part.dtype)
            seen.append(part)
        results.append(masked_attention(q[:, :, step : step + 1], *seen, None, None, 0.3, 0.0, None))
    return torch.cat(results, dim=2)


@settings(max_examples=40, deadline=None)
@given(policy=st.sampled_from(POLICIES), cuts=st.sets(st.integers(1, 29), max_size=6), seed=st.integers(0, 100))
def test_any_chunks_give_what_decoding_gives(policy: Retention, cuts: set[int], seed: int) -> None:
    q, k, v = vectors(1, HEADS, 30, seed), vectors(1, SHARED, 30, seed + 1), vectors(1, SHARED, 30, seed + 2)
    forms = forms_of(policy)
    cache = Cache(policy, forms, 1)
    borders = [0, *sorted(cuts), 30]
    parts = []
    for start, end in pairwise(borders):
        chunk = [x[:, :, start:end] for x in (q, k, v)]
        parts.append(cache.step(*chunk, torch.arange(start, end).unsqueeze(0), torch.tensor([0])))
    torch.testing.assert_close(torch.cat(parts, dim=2), by_definition(policy, q, k, v, forms), rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_do_not_see_each_other(policy: Retention) -> None:
    forms, lengths = forms_of(policy), (19, 7, 12)
    q, k, v = (vectors(3, heads, 20, seed) for heads, seed in ((HEADS, 0), (SHARED, 1), (SHARED, 2)))
    cache, slots = Cache(policy, forms, 4), torch.tensor([2, 0, 3])
    positions = torch.stack([torch.where(torch.arange(19) >= 19 - length, torch.arange(19) - 19 + length, -1) for length in lengths])
    moved = [
        torch.stack([x[row].roll(19 - length, 1) for row, length in enumerate(lengths)])[:, :, :19]
        for x in (q[:, :, :19], k[:, :, :19], v[:, :, :19])
    ]
    found = cache.step(*moved, positions, slots)
    last = torch.tensor([[19], [7], [-1]])  # the third sequence takes no part
    step = [torch.stack([x[row, :, length : length + 1] for row, length in enumerate(lengths)]) for x in (q, k, v)]
    after = cache.step(*step, last, slots)
    for row, length in enumerate(lengths):
        expected = by_definition(policy, *(x[row : row + 1, :, : length + 1] for x in (q, k, v)), forms)[0]
        torch.testing.assert_close(found[row, :, 19 - length :], expected[:, :length], rtol=0, atol=1e-12)
        assert not found[row, :, : 19 - length].any()
        torch.testing.assert_close(
            after[row, :, 0], torch.zeros(HEADS, SIZE).double() if row == 2 else expected[:, length], rtol=0, atol=1e-12
        )
    assert bool(cache.rows[0][1].isnan().all())  # nobody's row


def test_settled_pages_are_written_once() -> None:
    policy, forms = Retention(1, 2, 4), ("int4 t4 asym", "int4 asym")
    cache = Cache(policy, forms, 1)
    seen: dict[int, Tensor] = {}
    for position in range(25):
        x = vectors(1, HEADS, 1, position)
        cache.step(x, x[:, :SHARED], x[:, :SHARED], torch.tensor([[position]]), torch.tensor([0]))
        for slot in range(policy.page_slot(policy.settled(position + 1))):
            stored = cache.pages[0][cache.table[0, slot // PAGE].long(), :, slot % PAGE].clone()
            assert torch.equal(seen.setdefault(slot, stored), stored)
    assert len(seen) == 20


def test_a_sliding_window_and_soft_caps_are_those_of_the_plain_cache() -> None:
    q, k, v = vectors(1, HEADS, 12, 0), vectors(1, SHARED, 12, 1), vectors(1, SHARED, 12, 2)
    policy = Retention(12, 0, 1)  # nothing settles
    cache = Cache(policy, ("int4 asym", "int4 asym"), 1)
    found = cache.step(q, k, v, torch.arange(12).unsqueeze(0), torch.tensor([0]), window=5, softcap=2.0)
    row, column = torch.arange(12).unsqueeze(1), torch.arange(12)
    keep = ((column <= row) & (column > row - 5)).view(1, 1, 12, 12)
    torch.testing.assert_close(found, masked_attention(q, k, v, keep, None, 0.3, 2.0, None), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 5), recent=st.integers(0, 9), group=st.integers(1, 8), length=st.integers(0, 60))
def test_every_token_is_kept_once(first: int, recent: int, group: int, length: int) -> None:
    policy = Retention(first, recent, group)
    end = policy.settled(length)
    held = policy.held(length)
    assert sorted({*held, *range(first, end)}) == list(range(length))
    assert len(held) + max(0, end - first) == length
    assert length <= first or length - end >= min(recent, length - first)
    assert len({policy.row(position) for position in held}) == len(held) <= policy.rows
    assert all(0 <= policy.row(position) < policy.rows for position in held)
