"""The cache: pages are granted all or nothing, written by one row alone, shared where rows begin alike, and come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import CapacityError
from qcompile.ir.lowered import Buffer
from qcompile.quant.retention import Retention
from qcompile.runtime.cache_layout import CacheLayout, plan_layout
from qcompile.runtime.kv_cache import KVCache

HEADS, SIZE = 2, 8
SHAPE = ("pages", HEADS, "page_tokens", SIZE)
STATES = [Buffer("keys_0", "fp32", SHAPE, "state"), Buffer("values_0", "bf16", SHAPE, "state")]
BYTES = HEADS * SIZE * (4 + 2)
KIVI = Retention(2, 3, 4)
KEPT = [
    Buffer("keys_0", "uint8", SHAPE, "state"),
    Buffer("recent_keys_0", "fp16", ("sequences", HEADS, KIVI.rows, SIZE), "state"),
]
POLICIES = {"keys_0": KIVI, "recent_keys_0": KIVI}


def plain(max_batch: int, max_context: int, page_tokens: int | None = None, kv_bytes: int | None = None) -> CacheLayout:
    return plan_layout(STATES, max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes)


def kivi(max_batch: int, max_context: int, page_tokens: int | None = None, kv_bytes: int | None = None) -> CacheLayout:
    """Groups of four tokens settle; two first tokens and at least three recent ones do not."""
    return plan_layout(KEPT, POLICIES, max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes)


def mixed(max_batch: int, max_context: int, page_tokens: int | None = None, kv_bytes: int | None = None) -> CacheLayout:
    """A layer of each kind over one page table."""
    states = [*KEPT, Buffer("keys_1", "uint8", SHAPE, "state")]
    return plan_layout(states, POLICIES, max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes)


def owned(cache: KVCache) -> list[list[int]]:
    return [cache.pages_of(row) for row in range(cache.max_batch)]


def state_of(cache: KVCache) -> tuple[object, ...]:
    return list(cache.lengths), owned(cache), [cache.pool.holders(page) for page in range(cache.pool.pages)], cache.pool.free


def assert_sound(cache: KVCache) -> None:
    """Every page is held by as many rows as have it; each row has the pages that its tokens lie in."""
    held = Counter(page for row in owned(cache) for page in row)
    assert [cache.pool.holders(page) for page in range(cache.pool.pages)] == [held[page] for page in range(cache.pool.pages)]
    assert cache.pool.free == cache.pool.pages - len(held)
    for length, mine in zip(cache.lengths, owned(cache), strict=True):
        assert length <= cache.capacity
        assert cache.layout.pages_for(length) <= len(mine) == len(set(mine)) <= cache.layout.pages_per_sequence
    cache.bind(range(cache.max_batch))
    for place, mine in enumerate(owned(cache)):
        assert cache.page_table[place].tolist() == mine + [0] * (cache.layout.pages_per_sequence - len(mine))


def append(cache: KVCache, row: int, tokens: Sequence[int]) -> None:
    """Write tokens as the steps of a plan would: each settled one into its slot, each other one into its row."""
    cache.reserve([len(tokens)], [row])
    start = cache.lengths[row]
    for state in cache.layout.states:
        policy, tensor = cache.layout.policy(state), cache.tensors[state.name]
        if state.shape[0] == "pages":
            kept = cache.tensors.get("recent_keys_0", tensor)
            for position in range(policy.settled(start), policy.settled(start + len(tokens))):
                token = tokens[position - start] if position >= start else kept[row, 0, policy.row(position), 0]
                slot, size = policy.page_slot(position), cache.layout.page_tokens
                page = cache.pages_of(row)[slot // size]
                assert cache.pool.holders(page) == 1, "a page that two rows hold is never written"
                tensor[page, :, slot % size] = token
    for name, tensor in cache.tensors.items():
        if name.startswith("recent"):
            for index, token in enumerate(tokens):
                tensor[row, :, cache.layout.policies[name].row(start + index)] = token
    cache.advance([len(tokens)], [row])


def tokens_in(cache: KVCache, row: int) -> list[int]:
    """What a row holds, token after token, read back from its pages and rows."""
    stored = cache.read(row)
    packed = stored["keys_0"][0, :, 0].tolist()
    if "recent_keys_0" not in stored:
        return [int(token) for token in packed]
    policy, kept = cache.layout.policies["keys_0"], stored["recent_keys_0"][0, :, 0].tolist()
    both = dict(zip(policy.held(cache.lengths[row]), kept, strict=True))
    both |= {position + policy.first: token for position, token in enumerate(packed)}
    tokens = [int(both[position]) for position in range(cache.lengths[row])]
    assert "keys_1" not in stored or stored["keys_1"][1, :, 3].tolist() == tokens
    return tokens


@st.composite
def caches(draw: st.DrawFn) -> KVCache:
    layout = draw(st.sampled_from([plain, kivi, mixed]))
    rows, context = draw(st.integers(2, 4)), draw(st.integers(1, 24))
    page = draw(st.one_of(st.none(), st.integers(1, 9)))
    full = layout(rows, context, page)
    if draw(st.booleans()):
        return KVCache(full)
    least = full.nbytes - (full.pages - rows) * full.page_bytes // full.pages
    return KVCache(layout(rows, context, page or full.page_tokens, draw(st.integers(least, full.nbytes))))


@settings(max_examples=200, deadline=None)
@given(cache=caches(), data=st.data())
def test_rows_hold_their_own_tokens_whatever_they_share(cache: KVCache, data: st.DataObject) -> None:
    """Random rows write, fork, end and begin; what each holds is compared with a list of its tokens after every action."""
    expected: dict[int, list[int]] = {row: [] for row in range(cache.max_batch)}
    counter = 0
    for _ in range(data.draw(st.integers(1, 14))):
        row, other = data.draw(st.permutations(range(cache.max_batch)))[:2]
        action, before = data.draw(st.sampled_from(["write", "write", "write", "fork", "reset"])), state_of(cache)
        if action == "reset":
            cache.reset([row])
            expected[row] = []
        elif action == "fork" and not expected[other]:
            length = cache.shareable(row, data.draw(st.integers(0, cache.capacity)))
            cache.fork(row, other, length)
            expected[other] = expected[row][:length]
        elif action == "write":
            tokens = [(counter + index) % 200 + 1 for index in range(data.draw(st.integers(1, cache.capacity)))]
            counter += len(tokens)
            try:
                append(cache, row, tokens)
                expected[row] = expected[row] + tokens
            except CapacityError:
                assert state_of(cache) == before
        assert_sound(cache)
        assert {row: tokens_in(cache, row) for row in expected} == expected


@settings(max_examples=150, deadline=None)
@given(
    make=st.sampled_from([plain, kivi, mixed]), rows=st.integers(1, 5), context=st.integers(1, 40),
    page=st.one_of(st.none(), st.integers(1, 9)), budget=st.integers(0, 20_000),
)  # fmt: skip
def test_bytes_are_never_exceeded_and_no_page_more_would_fit(
    make: Callable[..., CacheLayout], rows: int, context: int, page: int | None, budget: int
) -> None:
    try:
        layout = make(rows, context, page, budget)
    except CapacityError as error:
        needed = int(str(error).split("at least ")[1].split()[0])
        assert budget < needed
        make(rows, context, page, needed)  # what the message asks for is enough
        return
    cache = KVCache(layout)
    tables = [cache.page_table, *([] if cache.slots is None else [cache.slots])]
    assert layout.nbytes == sum(tensor.nbytes for tensor in [*cache.tensors.values(), *tables]) <= budget
    assert layout.page_tokens % layout.group == 0
    assert layout.capacity <= context
    whole = make(rows, context, layout.page_tokens)
    assert layout.pages >= rows
    if layout.pages < whole.pages and page is not None:
        assert budget - layout.nbytes < layout.page_tokens * layout.bytes_per_token + rows * 4


@settings(deadline=None)
@given(
    make=st.sampled_from([plain, kivi, mixed]),
    rows=st.integers(1, 4),
    context=st.integers(1, 30),
    page=st.one_of(st.none(), st.integers(1, 9)),
)
def test_without_a_budget_every_row_holds_its_whole_context(
    make: Callable[..., CacheLayout], rows: int, context: int, page: int | None
) -> None:
    cache = KVCache(make(rows, context, page))
    assert cache.capacity == context
    cache.reserve([context] * rows, range(rows))
    cache.advance([context] * rows, range(rows))
    assert_sound(cache)


def test_tensors_have_the_shape_and_dtype_of_the_plan_and_are_zero() -> None:
    cache = KVCache(plain(3, 10, 4))
    assert cache.sizes == {"pages": 9, "pages_per_sequence": 3, "page_tokens": 4}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in cache.tensors.items()} == {
        "keys_0": (torch.float32, (9, HEADS, 4, SIZE)),
        "values_0": (torch.bfloat16, (9, HEADS, 4, SIZE)),
    }
    assert not any(tensor.any() for tensor in cache.tensors.values())
    assert (cache.layout.bytes_per_token, cache.nbytes, cache.layout.table_bytes) == (BYTES, 36 * BYTES, 9 * 4)


def test_a_cache_that_memory_has_no_room_for_is_refused() -> None:
    layout = plain(1, 1 << 50, None)
    with pytest.raises(CapacityError, match=rf"cache: expected {layout.page_bytes} bytes of memory.*; load with a lower max_batch or max"):
        KVCache(layout)


def test_pages_hold_whole_groups_and_only_what_settles() -> None:
    layout = kivi(2, 21, 5)
    assert layout.page_tokens == 8
    assert [layout.pages_for(length) for length in (8, 9, 16, 17, 21)] == [0, 1, 1, 2, 2]  # 4 of 9 tokens have settled, 12 of 17
    assert layout.sizes == {"pages": 4, "pages_per_sequence": 2, "page_tokens": 8, "sequences": 2}


def test_rows_of_any_lengths_share_the_bytes() -> None:
    budget = plain(4, 1000, 8, None).page_bytes // 4
    cache = KVCache(plain(4, 1000, 8, budget))
    assert (cache.capacity, cache.pool.pages) == (976, 122)  # three pages less than 1000 tokens: the tables are paid for, too
    cache.reserve([900, 30, 8, 1], range(4))
    cache.advance([900, 30, 8, 1], range(4))
    assert_sound(cache)
    with pytest.raises(CapacityError, match="expected at most 3 more pages of 8 tokens, got a demand for 4; raise kv_bytes, or run fewer"):
        cache.reserve([25], [2])


def test_pages_are_given_out_lowest_first_and_come_back() -> None:
    cache = KVCache(plain(2, 12, 4))
    cache.reserve([5, 3], [0, 1])
    cache.advance([5, 3], [0, 1])
    assert owned(cache) == [[0, 1], [2]]
    cache.reserve([3, 2], [0, 1])
    assert owned(cache) == [[0, 1], [2, 3]]
    cache.reset([0])
    assert (cache.lengths, owned(cache)) == ([0, 3], [[], [2, 3]])
    cache.reserve([1, 6], [0, 1])
    assert owned(cache) == [[0], [2, 3, 1]]
    cache.reset()
    assert_sound(cache)
    assert cache.pool.free == 6


def test_a_fork_shares_all_pages_and_the_first_to_write_copies_the_last() -> None:
    cache = KVCache(plain(3, 12, 4))
    append(cache, 0, [1, 2, 3, 4, 5, 6])
    cache.fork(0, 1)
    cache.fork(0, 2)
    assert owned(cache) == [[0, 1], [0, 1], [0, 1]]
    append(cache, 1, [7])
    append(cache, 0, [8])
    append(cache, 2, [9])  # it alone is left with the old one
    assert owned(cache) == [[0, 3], [0, 2], [0, 1]]
    assert [tokens_in(cache, row)[4:] for row in range(3)] == [[5, 6, 8], [5, 6, 7], [5, 6, 9]]


def test_pages_to_copy_count_as_demand() -> None:
    cache = KVCache(plain(3, 12, 4, kv_bytes=4 * 4 * BYTES + 9 * 4))
    append(cache, 0, [1, 2, 3, 4, 5])
    cache.fork(0, 1)
    cache.fork(0, 2)
    before = state_of(cache)
    cache.require([1, 1], [0, 1])
    with pytest.raises(CapacityError, match="expected at most 2 more pages of 4 tokens, got a demand for 3"):
        cache.reserve([4, 1, 1], [0, 1, 2])
    assert state_of(cache) == before


def test_a_fork_may_begin_where_nothing_has_settled_since() -> None:
    cache = KVCache(kivi(2, 30, 4))
    append(cache, 0, list(range(1, 15)))
    # Of 14 tokens 2 to 9 have settled, and had so from 13 on; before 13, tokens 6 to 9 stood in rows that others have taken.
    assert [cache.shareable(0, length) for length in (20, 14, 13, 12, 5, 2, 1)] == [14, 14, 13, 2, 2, 2, 1]


@pytest.mark.parametrize("make", [plain, kivi, mixed])
def test_what_is_read_can_be_written_into_other_pages(make: Callable[..., CacheLayout]) -> None:
    first, second = KVCache(make(2, 40, 4)), KVCache(make(3, 40, 12))
    append(first, 1, list(range(1, 24)))
    second.write(2, 23, first.read(1))
    for cache, row in ((first, 1), (second, 2)):
        append(cache, row, list(range(24, 31)))
        assert tokens_in(cache, row) == list(range(1, 31))
    shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in second.read(2).items()}
    assert shapes == second.shapes(30) == first.shapes(30)
    before = state_of(first)
    with pytest.raises(CapacityError, match="expected at most 40 tokens, the capacity of the cache, got 41"):
        first.write(0, 41, {})
    assert state_of(first) == before


def test_padding_of_a_batch_has_no_pages() -> None:
    cache = KVCache(kivi(3, 20, 4))
    append(cache, 2, [1] * 13)
    append(cache, 0, [1] * 13)
    cache.bind([2, 0], 3)
    assert cache.page_table.tolist() == [[0, 1, 0], [2, 3, 0], [0, 0, 0]]
    assert cache.slots is not None
    assert cache.slots.tolist() == [2, 0, 0]
    assert cache.inputs(2)["page_table"].data_ptr() == cache.page_table.data_ptr()


def _cache() -> KVCache:
    cache = KVCache(plain(2, 12, 4, 3 * 4 * BYTES + 6 * 4))
    cache.reserve([6], [0])
    cache.advance([6], [0])
    return cache


@pytest.mark.parametrize(("demand", "message"), [
    (lambda cache: cache.reserve([1, 7], [1, 0]),
     "sequence 0: expected at most 12 tokens, the capacity of the cache, got 7 after 6 held; load with max_context=13 or more"),
    (lambda cache: cache.reserve([13], [1]), "sequence 1: expected at most 12 tokens, the capacity of the cache, got 13; load"),
    (lambda cache: cache.reserve([1, 5], [0, 1]), "cache: expected at most 1 more pages of 4 tokens, got a demand for 2; raise kv_bytes"),
    (lambda cache: cache.require_new([4, 1]), "cache: expected at most 1 more pages of 4 tokens, got a demand for 2; raise kv_bytes"),
    (lambda cache: cache.require_new([12, 1], keeping=False), "expected at most 3 more pages of 4 tokens, got a demand for 4"),
])  # fmt: skip
def test_demands_beyond_the_capacity_are_refused_and_change_nothing(demand: Callable[[KVCache], None], message: str) -> None:
    cache = _cache()
    before = state_of(cache)
    with pytest.raises(CapacityError, match=message):
        demand(cache)
    assert state_of(cache) == before


def test_shared_beginnings_cost_their_pages_once() -> None:
    cache = _cache()
    cache.require_new([7, 7], [6, 6], keeping=False)  # two pages of the first, the second of the second
    with pytest.raises(CapacityError, match="a demand for 4"):
        cache.require_new([7, 7], [3], keeping=False)


@pytest.mark.parametrize(("options", "message"), [
    ((2, 8, 4, 8 * BYTES + 15), rf"expected kv_bytes of at least {8 * BYTES + 16} \(a page of 4 tokens for each of 2 sequences\), got "),
    ((2, 8, None, 2 * BYTES + 15), rf"expected kv_bytes of at least {2 * BYTES + 16} \(a page of 1 tokens for each of 2 sequences\)"),
    ((2, 0), "max_context=0: expected at least 1"),
    ((0, 8), "max_batch=0: expected at least 1"),
    ((2, 8, 0), "page_tokens=0: expected at least 1; give more, or leave it out"),
    ((2, 8, -4), "page_tokens=-4: expected at least 1"),
])  # fmt: skip
def test_a_cache_without_room_for_a_page_per_row_is_refused(options: tuple[int, ...], message: str) -> None:
    with pytest.raises(CapacityError, match=f"cache: {message}"):
        plain(*options)
