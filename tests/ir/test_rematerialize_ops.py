"""Attention over what keys and values are made from, against projecting first and caching both."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qcompile.ir.cache_ops import pack_vectors, turned, unpack_vectors
from qcompile.ir.ops import cache_append, cache_attend, masked_attention
from qcompile.ir.rematerialize_ops import attend_rematerialized, attend_settled_sources, cache_store, cache_store_
from qcompile.ir.retention_ops import retain, settle, with_recent
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format

HEADS, SHARED, SIZE, VALUES, INPUTS, PAGE = 4, 2, 8, 6, 20, 4
FORM = "int6 g4"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


K_WEIGHT, V_WEIGHT = random(SHARED * SIZE, INPUTS), random(SHARED * VALUES, INPUTS, seed=1)
K_BIAS, V_BIAS = random(SHARED * SIZE, seed=2), random(SHARED * VALUES, seed=3)
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.02])


def expected(q: Tensor, x: Tensor, table: Tensor, positions: Tensor, inv_freq: Tensor | None, **options: float) -> Tensor:
    """Over a plain cache of the keys and values of what a cache of x gives back."""
    read = unpack_vectors(pack_vectors(x.unsqueeze(1), FORM), FORM, INPUTS, torch.float64)[:, 0]
    k, v = (
        functional.linear(read, weight, bias).unflatten(2, (SHARED, -1)).transpose(1, 2)
        for weight, bias in ((K_WEIGHT, K_BIAS), (V_WEIGHT, V_BIAS))
    )
    pages = [torch.zeros(8, SHARED, PAGE, size).double() for size in (SIZE, VALUES)]
    return cache_attend(
        q, *cache_append(*pages, turned(k, inv_freq, 1.0), v, table, torch.arange(x.shape[1]).expand(x.shape[:2])), table, positions, 0.3,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}])
@pytest.mark.parametrize("inv_freq", [None, FREQUENCIES])
def test_keys_and_values_are_those_of_what_is_stored(inv_freq: Tensor | None, options: dict[str, float]) -> None:
    q, x = random(2, HEADS, 11, SIZE, seed=4), random(2, 11, INPUTS, seed=5)
    table, positions = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(2, 4).int(), torch.arange(11).repeat(2, 1)
    pages = torch.zeros(8, 1, PAGE, pack_vectors(x, FORM).shape[-1], dtype=torch.uint8)
    on_read = {"k_bias": K_BIAS, "v_bias": V_BIAS, "inv_freq": inv_freq, **options}
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 11)):
        pages = cache_store(pages, pack_vectors(x[:, part].unsqueeze(1), FORM), table, positions[:, part])
        given = (q[:, :, part], pages, table, positions[:, part], FORM, K_WEIGHT, V_WEIGHT, 0.3)
        parts.append(attend_rematerialized(*given, **on_read))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected(q, x, table, positions, inv_freq, **options), rtol=0, atol=1e-12)


def test_padding_is_not_stored_and_gives_nothing() -> None:
    q, x = random(2, HEADS, 5, SIZE, seed=4), random(2, 5, INPUTS, seed=5)
    table, positions = torch.tensor([[1, 0], [3, 2]]).int(), torch.tensor([[-1, 0, 1, -1, 2], [-1] * 5])
    packed = pack_vectors(x.unsqueeze(1), FORM)
    pages = torch.zeros(4, 1, PAGE, packed.shape[-1], dtype=torch.uint8)
    stored = cache_store(pages, packed, table, positions)
    cache_store_(pages, packed, table, positions)
    assert torch.equal(stored, pages)
    assert not pages[[0, 2, 3]].any()
    found = attend_rematerialized(q, pages, table, positions, FORM, K_WEIGHT, V_WEIGHT, 0.3, k_bias=K_BIAS, v_bias=V_BIAS)
    real = [1, 2, 4]
    alone = expected(q[:1, :, real], x[:1, real], table[:1], torch.arange(3).unsqueeze(0), None)
    torch.testing.assert_close(found[0, :, real], alone[0], rtol=0, atol=1e-12)
    assert not found[0, :, [0, 3]].any()
    assert not found[1].any()


POLICIES = [Retention(4, 0, 1), Retention(0, 3, 1), Retention(2, 5, 1), Retention(0, 0, 4), Retention(3, 2, 4)]
MAKING: dict[str, Any] = {"k_bias": K_BIAS, "v_bias": V_BIAS, "inv_freq": FREQUENCIES}


class Layer:
    """The state of one layer for `count` sequences, and its step."""

    def __init__(self, policy: Retention, count: int) -> None:
        self.policy, self.form = (policy.first, policy.recent, policy.group), form_of(policy)
        self.pages = torch.zeros(10 * count, 1, PAGE, vector_format(self.form).width(INPUTS), dtype=torch.uint8)
        self.rows = torch.full((count, 1, policy.rows, INPUTS), torch.nan, dtype=torch.float16)
        self.table = torch.randperm(10 * count, generator=torch.Generator().manual_seed(1)).view(count, 10).int()

    def step(self, q: Tensor, x: Tensor, positions: Tensor, slots: Tensor, **options: Any) -> Tensor:
        table = self.table[slots.long()]
        exact = with_recent(self.rows, x.unsqueeze(1), slots)
        self.pages = settle(self.pages, exact, table, positions, self.form, *self.policy)
        self.rows = retain(self.rows, exact, slots, positions, *self.policy)
        weights = (K_WEIGHT, V_WEIGHT)
        return attend_settled_sources(q, self.pages, exact, table, positions, self.form, *self.policy, *weights, 0.3, **MAKING, **options)


def form_of(policy: Retention) -> str:
    return f"int4 t{policy.group} asym" if policy.group > 1 else FORM


def by_definition(policy: Retention, q: Tensor, x: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
    """Token by token for one sequence: x in 16 bits, what has settled packed, keys and values of all of it."""
    form, results = vector_format(form_of(policy)), []
    for step in range(q.shape[2]):
        read, end = x[:, None, : step + 1].half().double(), policy.settled(step + 1)
        if end > policy.first:
            read[:, :, policy.first : end] = form.decode(form.encode(read[:, :, policy.first : end]), INPUTS, torch.float64)
        k, v = (
            functional.linear(read[:, 0], weight, bias).unflatten(2, (SHARED, -1)).transpose(1, 2)
            for weight, bias in ((K_WEIGHT, K_BIAS), (V_WEIGHT, V_BIAS))
        )
        first = max(0, step + 1 - window) if window else 0
        k = turned(k, FREQUENCIES, 1.0)[:, :, first:]
        results.append(masked_attention(q[:, :, step : step + 1], k, v[:, :, first:], None, None, 0.3, softcap, None))
    return torch.cat(results, dim=2)


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(POLICIES), cuts=st.sets(st.integers(1, 29), max_size=6), seed=st.integers(0, 100),
    options=st.sampled_from([{}, {"window": 7}, {"softcap": 2.0}]),
)  # fmt: skip
def test_any_chunks_give_what_decoding_gives(policy: Retention, cuts: set[int], seed: int, options: dict[str, Any]) -> None:
    q, x = random(1, HEADS, 30, SIZE, seed=seed), random(1, 30, INPUTS, seed=seed + 1)
    layer, parts = Layer(policy, 1), []
    for start, end in pairwise([0, *sorted(cuts), 30]):
        positions = torch.arange(start, end).unsqueeze(0)
        parts.append(layer.step(q[:, :, start:end], x[:, start:end], positions, torch.tensor([0]), **options))
    torch.testing.assert_close(torch.cat(parts, dim=2), by_definition(policy, q, x, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_do_not_see_each_other(policy: Retention) -> None:
    """Two of four sequences, padding before, between and behind their tokens, then a token for one of them."""
    q, x, layer, slots = random(2, HEADS, 20, SIZE, seed=4), random(2, 20, INPUTS, seed=5), Layer(policy, 4), torch.tensor([2, 0])
    positions = torch.full((2, 20), -1)
    places = ([*range(2, 9), *range(10, 20)], list(range(6)))
    for row, mine in enumerate(places):
        positions[row, mine] = torch.arange(len(mine))
    found = layer.step(q, x, positions, slots)
    after = layer.step(q[:, :, :1], x[:, :1], torch.tensor([[17], [-1]]), slots)
    for row, mine in enumerate(places):
        texts = (
            torch.cat((q[row : row + 1, :, mine], q[row : row + 1, :, :1]), dim=2),
            torch.cat((x[row : row + 1, mine], x[row : row + 1, :1]), dim=1),
        )
        expected = by_definition(policy, *texts)[0]
        torch.testing.assert_close(found[row, :, mine], expected[:, :-1], rtol=0, atol=1e-12)
        assert not found[row, :, positions[row] < 0].any()
        torch.testing.assert_close(after[row], torch.zeros_like(after[row]) if row else expected[:, -1:], rtol=0, atol=1e-12)
    assert bool(layer.rows[[1, 3]].isnan().all()), "nobody's rows"


def test_where_every_token_is_settled_both_operators_give_the_same() -> None:
    """Without sinks and window, but in rows of 16 bits that hold nothing."""
    q, x = random(1, HEADS, 11, SIZE, seed=4), random(1, 11, INPUTS, seed=5).half().double()
    table, positions = torch.tensor([[2, 0, 1]]).int(), torch.arange(11).unsqueeze(0)
    pages = torch.zeros(3, 1, PAGE, vector_format(FORM).width(INPUTS), dtype=torch.uint8)
    stored = cache_store(pages, pack_vectors(x.unsqueeze(1), FORM), table, positions)
    given = (table, positions, FORM)
    plain = attend_rematerialized(q, stored, *given, K_WEIGHT, V_WEIGHT, 0.3, **MAKING)
    settled = attend_settled_sources(q, stored, x.unsqueeze(1), *given, 0, 0, 1, K_WEIGHT, V_WEIGHT, 0.3, **MAKING)
    torch.testing.assert_close(settled, plain, rtol=0, atol=1e-12)
