"""Perplexity and distance, against values computed by hand and against the definition in one line."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from qcompile import evaluation
from qcompile.errors import SourceError
from qcompile.evaluation import evaluate, packaged_text, packaged_tokens


def _table_model(table: Tensor) -> evaluation.LogitsFunction:
    """A bigram model: the logits of a position are the row of its token."""
    return lambda tokens: table[tokens]


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    result = evaluate(_table_model(torch.zeros(7, 7)), torch.randint(0, 7, (3, 5)))
    assert result.perplexity == pytest.approx(7.0, rel=1e-12)
    assert result.tokens == 12
    assert result.to_dict() == {"perplexity": result.perplexity, "tokens": 12}


def test_a_model_beside_itself_has_no_distance() -> None:
    model = _table_model(torch.randn(7, 7))
    result = evaluate(model, torch.randint(0, 7, (3, 5)), model)
    assert (result.kl, result.top1) == (0.0, 1.0)
    assert result.reference_perplexity == result.perplexity


def test_divergence_is_of_the_reference_from_the_model() -> None:
    reference = torch.tensor([[math.log(0.5), math.log(0.5)]] * 2)
    model = torch.tensor([[math.log(0.9), math.log(0.1)]] * 2)
    result = evaluate(_table_model(model), torch.tensor([[0, 1]]), _table_model(reference))
    assert result.kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)
    assert result.perplexity == pytest.approx(10.0, rel=1e-6)


def test_excluded_tokens_of_the_reference_count_nothing() -> None:
    reference = torch.tensor([[0.0, -math.inf]] * 2)
    result = evaluate(_table_model(torch.zeros(2, 2)), torch.tensor([[0, 0]]), _table_model(reference))
    assert result.kl == pytest.approx(math.log(2), rel=1e-12)


def test_batches_and_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, tokens = _table_model(torch.randn(11, 11)), _table_model(torch.randn(11, 11)), torch.randint(0, 11, (5, 9))
    whole = evaluate(model, tokens, reference)
    log_q = torch.log_softmax(model(tokens)[:, :-1].double(), -1)
    log_p = torch.log_softmax(reference(tokens)[:, :-1].double(), -1)
    assert whole.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-12)
    assert whole.top1 == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 2 * 11 * 9)
    monkeypatch.setattr(evaluation, "_ROWS_AT_ONCE", 3)
    sizes: list[int] = []

    def counted(window: Tensor) -> Tensor:
        sizes.append(len(window))
        return model(window)

    steps: list[tuple[int, int]] = []
    pieces = evaluate(counted, tokens, reference, progress=lambda done, total: steps.append((done, total)))
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-12)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
    assert sizes == [1, 2, 2]
    assert steps == [(1, 5), (3, 5), (5, 5)]


@pytest.mark.parametrize("tokens", [torch.zeros(4).long(), torch.zeros(2, 4), torch.zeros(0, 4).long(), torch.zeros(2, 1).long()])
def test_tokens_of_another_shape_are_named(tokens: Tensor) -> None:
    with pytest.raises(SourceError, match=r"tokens: expected an integer array \[windows, length of at least 2\], got torch\.\w+ \["):
        evaluate(_table_model(torch.zeros(2, 2)), tokens)


def test_another_vocabulary_is_named() -> None:
    with pytest.raises(SourceError, match="reference: expected logits over 2 tokens like the compiled model, got 3"):
        evaluate(_table_model(torch.zeros(2, 2)), torch.zeros(1, 2).long(), _table_model(torch.zeros(2, 3)))


def test_packaged_halves_share_no_paragraph() -> None:
    calibration, text = (set(packaged_text(part).strip().split("\n\n")) for part in ("calibration", "evaluation"))
    assert not calibration & text
    for part in ("calibration", "evaluation"):
        assert 55_000 < len(packaged_text(part)) < 65_000


def _word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def test_packaged_tokens_are_windows() -> None:
    tokens = packaged_tokens(_word_tokenizer(), "evaluation", length=32, windows=4)
    assert tokens.shape == (4, 32)
    assert tokens.dtype == torch.int64
    assert tokens[0, 0] == 0
    assert (tokens == 1).any()


def test_too_many_windows_are_named() -> None:
    with pytest.raises(SourceError, match=r"evaluation text: expected at least 400 windows of 512 tokens, got \d+ tokens; ask for fewer"):
        packaged_tokens(_word_tokenizer(), "evaluation", length=512, windows=400)
