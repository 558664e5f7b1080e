"""Sampling against plain definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import QCompileError
from qcompile.runtime.sampling import Sampler, SamplingParameters, probabilities

SCORES = torch.tensor([[2.0, 1.0, 0.5, 0.1, -1.0], [0.0, 0.0, 3.0, 0.0, 0.0]])


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(SamplingParameters())(SCORES, [[], []]) == [0, 2]


def test_a_seed_repeats_and_frequencies_follow_the_distribution() -> None:
    parameters = SamplingParameters(temperature=0.7, seed=3)
    many = SCORES[:1].expand(4000, 5)
    first, again = (Sampler(parameters)(many, [[]] * 4000) for _ in range(2))
    assert first == again
    counts = torch.bincount(torch.tensor(first), minlength=5) / 4000
    # Four standard deviations of a binomial with 4000 draws.
    assert (counts - (SCORES[0] / 0.7).softmax(-1)).abs().max() < 4 * (0.25 / 4000) ** 0.5


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000), top_k=st.integers(0, 12), top_p=st.floats(0.05, 1), min_p=st.floats(0, 0.9), temperature=st.floats(0.2, 3),
)  # fmt: skip
def test_filters_keep_what_their_definitions_keep(seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    scores = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed))
    got = probabilities(scores, SamplingParameters(temperature, top_k, top_p, min_p))[0]
    order = scores[0].argsort(descending=True).tolist()
    kept = order[: top_k or 10]
    likely = (scores[0, kept] / temperature).softmax(-1)
    if top_p < 1:
        size = next((n for n in range(1, len(kept) + 1) if likely[:n].sum() >= top_p - 1e-6), len(kept))
        kept = kept[:size]
    likely = (scores[0, kept] / temperature).softmax(-1)
    kept = [token for token, chance in zip(kept, likely.tolist(), strict=True) if chance >= min_p * likely.max() - 1e-7]
    expected = torch.zeros(10)
    expected[kept] = (scores[0, kept] / temperature).softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_penalty_lowers_seen_tokens_whatever_their_sign() -> None:
    sampler = Sampler(SamplingParameters(repetition_penalty=3.0))
    assert sampler(SCORES, [[0], [2]]) == [1, 2]
    assert sampler(torch.tensor([[-1.0, -1.5]]), [[0]]) == [1]


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1}, "temperature=-1: expected at least 0"), ({"top_p": 0}, "top_p=0: expected above 0 and at most 1"),
    ({"top_k": -1}, "top_k=-1: expected at least 0"), ({"min_p": 1}, "min_p=1: expected at least 0 and below 1"),
    ({"repetition_penalty": 0}, "repetition_penalty=0: expected above 0"),
])  # fmt: skip
def test_parameters_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(QCompileError, match=message):
        SamplingParameters(**options)
