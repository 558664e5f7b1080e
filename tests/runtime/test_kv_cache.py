"""The cache: pages are granted all or nothing, belong to one row each, and come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import CapacityError
from qcompile.ir.lowered import Buffer
from qcompile.runtime.kv_cache import KVCache

HEADS, SIZE = 2, 8
SHAPE = ("pages", HEADS, "page_tokens", SIZE)
STATES = [Buffer("keys_0", "fp32", SHAPE, "state"), Buffer("values_0", "bf16", SHAPE, "state")]
BYTES = HEADS * SIZE * (4 + 2)


def owned(cache: KVCache) -> list[list[int]]:
    """The pages of each row, without the padding of the table."""
    return [list(pages) for pages in cache._owned]


def state_of(cache: KVCache) -> tuple[object, ...]:
    return list(cache.lengths), owned(cache), list(cache._free)


def assert_sound(cache: KVCache) -> None:
    """Every page is free or owned by one row; each row owns the pages that its tokens lie in."""
    pages = [page for row in owned(cache) for page in row]
    assert sorted(pages + cache._free) == list(range(cache.pages))
    for length, mine in zip(cache.lengths, owned(cache), strict=True):
        assert length <= min(cache.capacity, len(mine) * cache.page_tokens)
        assert len(mine) <= cache.pages_per_sequence
    table = cache.table(range(cache.max_batch))
    assert all(len(row) == cache.pages_per_sequence for row in table)
    assert [row[: len(mine)] for row, mine in zip(table, owned(cache), strict=True)] == owned(cache)


@st.composite
def caches(draw: st.DrawFn) -> KVCache:
    rows, context = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    page = draw(st.one_of(st.just(0), st.integers(1, 9)))
    least = max(page, 1) * rows * BYTES
    kv_bytes = draw(st.one_of(st.none(), st.integers(least, least * 6 + BYTES)))
    return KVCache(STATES, max_batch=rows, max_context=context, page_tokens=page, kv_bytes=kv_bytes)


@settings(max_examples=150, deadline=None)
@given(cache=caches(), data=st.data())
def test_pages_are_granted_all_or_nothing_and_never_shared(cache: KVCache, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 12))):
        rows = data.draw(st.lists(st.integers(0, cache.max_batch - 1), unique=True, min_size=1))
        tokens = [data.draw(st.integers(0, cache.capacity + 1)) for _ in rows]
        action = data.draw(st.sampled_from(["write", "reserve", "reset"]))
        before = state_of(cache)
        if action == "reset":
            cache.reset(rows)
            assert all(not cache.lengths[row] and not owned(cache)[row] for row in rows)
        else:
            try:
                cache.reserve(tokens, rows)
            except CapacityError:
                assert state_of(cache) == before
            else:
                assert all(
                    len(owned(cache)[row]) * cache.page_tokens >= cache.lengths[row] + n for row, n in zip(rows, tokens, strict=True)
                )
                if action == "write":
                    cache.advance(tokens, rows)
        assert_sound(cache)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 5), context=st.integers(1, 40), page=st.integers(0, 9), budget=st.integers(0, 20_000))
def test_bytes_are_never_exceeded_and_never_wasted_by_a_page_per_row(rows: int, context: int, page: int, budget: int) -> None:
    affordable = budget // BYTES
    try:
        cache = KVCache(STATES, max_batch=rows, max_context=context, page_tokens=page, kv_bytes=budget)
    except CapacityError:
        assert affordable < rows * max(page, 1)
        return
    assert cache.nbytes <= budget
    assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors.values())
    assert cache.capacity <= context
    if page:
        assert cache.pages == min(rows * -(-context // page), affordable // page)
    else:
        assert (cache.pages, cache.pages_per_sequence, cache.page_tokens) == (rows, 1, min(context, affordable // rows))


@settings(deadline=None)
@given(rows=st.integers(1, 4), context=st.integers(1, 30), page=st.integers(0, 9))
def test_without_a_budget_every_row_holds_its_whole_context(rows: int, context: int, page: int) -> None:
    cache = KVCache(STATES, max_batch=rows, max_context=context, page_tokens=page)
    assert cache.capacity == context
    cache.reserve([context] * rows, range(rows))
    cache.advance([context] * rows, range(rows))
    assert_sound(cache)


def test_tensors_have_the_shape_and_dtype_of_the_plan_and_are_zero() -> None:
    cache = KVCache(STATES, max_batch=3, max_context=10, page_tokens=4)
    assert (cache.pages, cache.pages_per_sequence) == (9, 3)
    assert cache.sizes == {"pages": 9, "pages_per_sequence": 3, "page_tokens": 4}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in cache.tensors.items()} == {
        "keys_0": (torch.float32, (9, HEADS, 4, SIZE)),
        "values_0": (torch.bfloat16, (9, HEADS, 4, SIZE)),
    }
    assert not any(tensor.any() for tensor in cache.tensors.values())
    assert (cache.bytes_per_token, cache.nbytes) == (BYTES, 36 * BYTES)


def test_pages_are_given_out_lowest_first_and_come_back() -> None:
    cache = KVCache(STATES, max_batch=2, max_context=12, page_tokens=4)
    cache.reserve([5, 3], [0, 1])
    cache.advance([5, 3], [0, 1])
    assert cache.table([0, 1]) == [[0, 1, 0], [2, 0, 0]]
    cache.reserve([3, 2], [0, 1])
    assert cache.table([1, 0]) == [[2, 3, 0], [0, 1, 0]]
    cache.reset([0])
    assert (cache.lengths, owned(cache)) == ([0, 3], [[], [2, 3]])
    cache.reserve([1, 6], [0, 1])
    assert cache.table([0, 1]) == [[0, 0, 0], [2, 3, 1]]
    cache.reset()
    assert_sound(cache)
    assert cache._free == [5, 4, 3, 2, 1, 0]


def test_a_reservation_that_was_not_used_lends_nothing_to_other_rows() -> None:
    cache = KVCache(STATES, max_batch=2, max_context=12, page_tokens=4, kv_bytes=4 * 4 * BYTES)
    cache.reserve([12], [0])
    with pytest.raises(CapacityError, match=r"expected at most 1 more pages of 4 tokens, got a demand for 3; raise kv_bytes, or run fewer"):
        cache.reserve([1, 12], [0, 1])
    assert_sound(cache)


def _cache() -> KVCache:
    cache = KVCache(STATES, max_batch=2, max_context=12, page_tokens=4, kv_bytes=3 * 4 * BYTES)
    cache.reserve([6], [0])
    cache.advance([6], [0])
    return cache


@pytest.mark.parametrize(("demand", "message"), [
    (lambda cache: cache.reserve([1], [2]), "row 2: expected at most 2 sequences at once; load with max_batch=3"),
    (lambda cache: cache.reserve([1, 7], [1, 0]),
     "sequence 0: expected at most 12 tokens, the capacity of the cache, got 7 after 6 held; load with max_context=13 or more, or shorten"),
    (lambda cache: cache.reserve([13], [1]), "sequence 1: expected at most 12 tokens, the capacity of the cache, got 13; load"),
    (lambda cache: cache.reserve([1, 5], [0, 1]), "cache: expected at most 1 more pages of 4 tokens, got a demand for 2; raise kv_bytes"),
])  # fmt: skip
def test_demands_beyond_the_capacity_are_refused_and_change_nothing(demand: Callable[[KVCache], None], message: str) -> None:
    cache = _cache()
    before = state_of(cache)
    with pytest.raises(CapacityError, match=message):
        demand(cache)
    assert state_of(cache) == before


@pytest.mark.parametrize(("options", "message"), [
    ({"max_batch": 2, "max_context": 8, "page_tokens": 4, "kv_bytes": 8 * BYTES - 1},
     f"a page of 4 tokens in each of 2 rows, got {8 * BYTES - 1} bytes at {BYTES} bytes per token; raise kv_bytes or max_context"),
    ({"max_batch": 2, "max_context": 8, "kv_bytes": 2 * BYTES - 1}, "a page of 1 tokens in each of 2 rows, got"),
    ({"max_batch": 2, "max_context": 0}, "a page of 1 tokens in each of 2 rows, got 0 tokens"),
    ({"max_batch": 0, "max_context": 8}, "in each of 0 rows, got 8 tokens"),
])  # fmt: skip
def test_a_cache_without_room_for_a_page_per_row_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(CapacityError, match=f"cache: expected room for at least {message if message.startswith('a') else '.*' + message}"):
        KVCache(STATES, **options)  # type: ignore[arg-type]
