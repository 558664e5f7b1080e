"""Caches whose tokens are packed by the attention they have received: the rule, token by token, and what it is good for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.ir.cache_ops import turned
from qcompile.ir.ops import attention_weights
from qcompile.ir.ranked_ops import attend_ranked, attend_ranked_, marks_width
from qcompile.ir.retention_ops import retain, with_recent
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format

HEADS, SHARED, SIZE, PAGE = 4, 2, 8, 4
POLICIES = [Retention(2, 3, 4), Retention(0, 1, 2), Retention(3, 6, 8), Retention(1, 5, 4)]


def vectors(heads: int, tokens: int, seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, heads, tokens, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def form_of(policy: Retention, fine: str = "int4 g4", coarse: str = "int2 g4") -> str:
    return f"{fine} over {coarse} top {policy.group // 2} of {policy.group}"


class Cache:
    """One layer's state for `sequences`, and its step."""

    def __init__(self, policy: Retention, form: str, sequences: int = 1, tokens: int = 48) -> None:
        self.form, self.options = form, (policy.first, policy.recent, policy.group)
        pages, width = tokens // PAGE, vector_format(form).width(SIZE)
        self.pages = [
            torch.zeros(pages * sequences, heads, PAGE, wide, dtype=torch.uint8)
            for heads, wide in ((SHARED, width), (SHARED, width), (1, marks_width(SHARED)))
        ]
        self.rows = [torch.full((sequences, SHARED, policy.rows, SIZE), torch.nan).double() for _ in range(2)]
        self.saliency = torch.full((sequences, SHARED, policy.rows, 1), torch.nan)
        self.table = torch.randperm(pages * sequences, generator=torch.Generator().manual_seed(1)).view(sequences, pages).int()

    def step(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, **options: object) -> Tensor:
        exact = [with_recent(rows, x, slots) for rows, x in zip(self.rows, (k, v), strict=True)]
        self.rows = [retain(rows, x, slots, positions, *self.options) for rows, x in zip(self.rows, exact, strict=True)]
        given = (*exact, slots, self.table[slots.long()], positions, self.form, self.form, *self.options, 0.3)
        out, *self.pages, self.saliency = attend_ranked(q, *self.pages, self.saliency, *given, **options)  # type: ignore[arg-type]
        return out

    def read(self, q: Tensor, k: Tensor, v: Tensor, cuts: set[int], **options: object) -> Tensor:
        """A sequence in chunks."""
        parts = []
        for start, end in pairwise([0, *sorted(cuts), q.shape[2]]):
            chunk = [x[:, :, start:end] for x in (q, k, v)]
            parts.append(self.step(*chunk, torch.arange(start, end).unsqueeze(0), torch.tensor([0]), **options))
        return torch.cat(parts, dim=2)


def by_definition(
    policy: Retention, q: Tensor, k: Tensor, v: Tensor, form: str, window: int = 0, inv_freq: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Query by query from the rule's sentences, and the marks [L, T]: mean weights since a token came, the best half of a group fine."""
    kind, tokens = vector_format(form), q.shape[2]
    given = torch.zeros(SHARED, tokens, dtype=torch.float64)
    seen = torch.zeros(tokens)
    marks = torch.zeros(SHARED, tokens, dtype=torch.bool)
    k, v, results = k.clone(), v.clone(), []
    for step in range(tokens):
        group = range(policy.settled(step), policy.settled(step + 1))
        if step and group:
            place = slice(group.start, group.stop)
            order = (given[:, place] / seen[place]).argsort(dim=1, descending=True)
            for head in range(SHARED):
                marks[head, [group.start + int(best) for best in order[head, : policy.group // 2]]] = True
            for x in (k, v):
                x[0, :, place] = kind.decode(kind.encode(x[0, :, place], (marks[:, place],)), SIZE, x.dtype, (marks[:, place],))
        keep = torch.arange(step + 1) > step - window if window else None
        weights = attention_weights(q[:, :, step : step + 1], turned(k[:, :, : step + 1], inv_freq, 1.0), keep, None, 0.3, 0.0, None)
        given[:, : step + 1] += weights[0, :, 0].view(SHARED, -1, step + 1).mean(1)
        seen[: step + 1] += torch.ones(step + 1) if keep is None else keep
        results.append(torch.matmul(weights, v[:, :, : step + 1].repeat_interleave(HEADS // SHARED, 1)))
    return torch.cat(results, dim=2), marks


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(POLICIES), cuts=st.sets(st.integers(1, 39), max_size=8), seed=st.integers(0, 100), window=st.sampled_from([0, 9])
)
def test_any_chunks_give_what_decoding_gives(policy: Retention, cuts: set[int], seed: int, window: int) -> None:
    q, k, v = vectors(HEADS, 40, seed), vectors(SHARED, 40, seed + 1), vectors(SHARED, 40, seed + 2)
    form = form_of(policy)
    expected, _ = by_definition(policy, q, k, v, form, window)
    torch.testing.assert_close(Cache(policy, form).read(q, k, v, cuts, window=window), expected, rtol=0, atol=1e-12)


def test_keys_before_positions_are_turned_on_reading() -> None:
    policy, frequencies = POLICIES[0], torch.tensor([1.0, 0.3, 0.1, 0.02])
    q, k, v = vectors(HEADS, 30, 0), vectors(SHARED, 30, 1), vectors(SHARED, 30, 2)
    expected, _ = by_definition(policy, q, k, v, form_of(policy), inv_freq=frequencies)
    found = Cache(policy, form_of(policy)).read(q, k, v, {7, 20}, inv_freq=frequencies)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rows_of_a_batch_do_not_see_each_other_and_padding_gives_nothing() -> None:
    policy, lengths = POLICIES[0], (19, 8, 13)
    form, slots = form_of(policy), torch.tensor([2, 0, 3])
    q, k, v = vectors(HEADS, 19, 0, 3), vectors(SHARED, 19, 1, 3), vectors(SHARED, 19, 2, 3)
    cache = Cache(policy, form, 4)
    positions = torch.stack([torch.where(torch.arange(19) < length, torch.arange(19), -1) for length in lengths])
    found = cache.step(q, k, v, positions, slots)
    for row, length in enumerate(lengths):
        expected, _ = by_definition(policy, *(x[row : row + 1, :, :length] for x in (q, k, v)), form)
        torch.testing.assert_close(found[row, :, :length], expected[0], rtol=0, atol=1e-12)
        assert not found[row, :, length:].any()
    assert bool(cache.saliency[1].isnan().all())  # nobody's row


def test_tokens_that_get_the_attention_are_fine() -> None:
    policy = Retention(0, 8, 8)
    q, k, v = vectors(HEADS, 40, 0), vectors(SHARED, 40, 1) * 0.05, vectors(SHARED, 40, 2)
    wanted = [{1, 4, 6, 7}, {8, 9, 10, 15}]  # every query looks along (1, ..., 1), the first head's keys at these tokens too
    q[:] = 1 + 0.1 * q
    for head, tokens in enumerate(wanted):
        k[0, head, sorted(tokens)] += 1.0
    cache = Cache(policy, form_of(policy))
    cache.read(q, k, v, {5, 6})
    _, expected = by_definition(policy, q, k, v, form_of(policy))
    slots = torch.arange(16)
    packed = cache.pages[2][cache.table[0, slots // PAGE].long(), 0, slots % PAGE, 0]
    marks = torch.stack([(packed >> head) & 1 for head in range(SHARED)]).bool()
    assert torch.equal(marks, expected[:, :16])
    assert {int(token) for token in marks[0, :8].nonzero()} == wanted[0]
    assert {8 + int(token) for token in marks[1, 8:].nonzero()} == wanted[1]


def test_the_error_lies_between_all_fine_and_all_coarse_and_is_less_than_by_the_wrong_tokens() -> None:
    policy, queries = Retention(0, 8, 8), vectors(HEADS, 48, 0)
    k, v = vectors(SHARED, 48, 1), vectors(SHARED, 48, 2)
    k[0, :, ::3] *= 4  # every third key is looked at, or away from, by more

    def error(form: str) -> float:
        cache = Cache(policy, form)
        return float((cache.read(queries, k, v, set()) - exact).square().mean())

    exact = Cache(Retention(48, 8, 8), form_of(policy)).read(queries, k, v, set())
    ranked, wrong = form_of(policy), form_of(policy, "int2 g4", "int4 g4")
    fine, coarse = form_of(policy, "int4 g4", "int4 g4"), form_of(policy, "int2 g4", "int2 g4")
    assert vector_format(ranked).width(SIZE) == vector_format(wrong).width(SIZE)
    assert error(fine) < error(ranked) < 0.5 * min(error(wrong), error(coarse))


def test_in_place_is_the_same() -> None:
    policy = POLICIES[0]
    q, k, v = vectors(HEADS, 12, 0), vectors(SHARED, 12, 1), vectors(SHARED, 12, 2)
    cache, slots, positions = Cache(policy, form_of(policy)), torch.tensor([0]), torch.arange(12).unsqueeze(0)
    exact = [with_recent(rows, x, slots) for rows, x in zip(cache.rows, (k, v), strict=True)]
    given = (*exact, slots, cache.table, positions, cache.form, cache.form, *cache.options, 0.3)
    states = [state.clone() for state in (*cache.pages, cache.saliency)]
    out, *expected = attend_ranked(q, *states, *given)  # type: ignore[arg-type]
    assert not states[0].any()
    assert torch.equal(attend_ranked_(q, *states, *given), out)  # type: ignore[arg-type]
    assert all(torch.equal(state.nan_to_num(), other.nan_to_num()) for state, other in zip(states, expected, strict=True))
    assert states[0].any()


def test_forms_that_nothing_ranks_are_refused() -> None:
    cache, slots = Cache(POLICIES[0], form_of(POLICIES[0])), torch.tensor([0])
    x = vectors(HEADS, 5, 0)
    cache.form = "int4 g4"
    with pytest.raises(FormatError, match=r"attend_ranked: expected two ranked formats .* got 'int4 g4', 'int4 g4' and 3; choose kv4-zip"):
        cache.step(x, x[:, :SHARED], x[:, :SHARED], torch.arange(5).unsqueeze(0), slots)
