"""Calibration data: everything a user may give, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from qcompile.data import packaged_text
from qcompile.errors import SourceError, TokenizerError
from qcompile.ir.records import Assets
from qcompile.passes.calibration import batches, make_calibration
from tests.models import VOCABULARY
from tests.passes.helpers import Gated, capture
from tests.passes.test_stream import language_model, tokens


def word_assets(**options: Any) -> Assets:
    """A tokenizer of one token per word: the packaged text's most frequent ones."""
    words = dict.fromkeys(packaged_text("calibration").split())
    vocabulary = {word: index for index, word in enumerate(["?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(8)  # what a checkpoint asks for inputs must not cut a text
    return Assets(files={"tokenizer.json": tokenizer.to_str().encode()}, vocab_size=len(vocabulary), name="words", **options)


@pytest.mark.parametrize("form", ["tensor", "array", "int32", "path", "text path"])
def test_token_arrays(form: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, tokens().numpy().astype(np.uint16))
    given = {"tensor": tokens(), "array": tokens().numpy(), "int32": tokens().int(), "path": path, "text path": str(path)}[form]
    assert torch.equal(make_calibration(given, Assets()).data.tokens, tokens())


def test_samples_and_length_cut_an_array() -> None:
    data = make_calibration(tokens(), Assets(), num_calibration_samples=2, max_seq_length=5).data
    assert torch.equal(data.tokens, tokens()[:2, :5])


def test_none_is_the_calibration_half_of_the_packaged_text_and_is_read_late() -> None:
    assert make_calibration(None, Assets()) is not None  # no tokenizer, and none needed yet
    assets = word_assets()
    data = make_calibration(None, assets, num_calibration_samples=3, max_seq_length=20).data
    vocabulary = Tokenizer.from_buffer(assets.files["tokenizer.json"]).get_vocab()
    words = packaged_text("calibration").split()[:60]
    assert data.tokens.tolist() == np.array([vocabulary[word] for word in words]).reshape(3, 20).tolist()  # type: ignore[union-attr]


def test_windows_of_text_are_no_longer_than_the_model_takes() -> None:
    data = make_calibration(None, word_assets(max_positions=100)).data
    assert data.tokens.shape == (64, 100)  # type: ignore[union-attr]
    longest = make_calibration(None, word_assets()).data
    assert longest.tokens.shape[1] == 512  # type: ignore[union-attr]


def test_text_and_text_files(tmp_path: Path) -> None:
    text = " ".join(packaged_text("calibration").split()[:50])
    path = tmp_path / "text.txt"
    path.write_text(text)
    assets = word_assets()
    data = [make_calibration(given, assets, max_seq_length=16).data.tokens for given in (text, path, str(path))]
    assert data[0].shape == (3, 16)  # type: ignore[union-attr]
    assert torch.equal(data[0], data[1])  # type: ignore[arg-type]
    assert torch.equal(data[0], data[2])  # type: ignore[arg-type]
    assert make_calibration("a short text", assets).data.tokens.shape == (1, 3)  # type: ignore[union-attr]


def test_text_needs_a_tokenizer() -> None:
    calibration = make_calibration(None, Assets(name="m"))
    with pytest.raises(TokenizerError, match="calibration of m: expected a tokenizer for packaged text, got none; pass calibration= token"):
        _ = calibration.data


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"expected an integer array \[windows, length\] of tokens, got int64 \[3\]"),
        (np.zeros((2, 3)), r"of tokens, got float64 \[2, 3\]"),
        (torch.zeros(0, 4, dtype=torch.long), r"of tokens, got int64 \[0, 4\]"),
        (torch.full((1, 4), 100), "expected tokens between 0 and 99, got 100; tokenize the text with this model's tokenizer"),
        (torch.full((1, 4), -1), "expected tokens between 0 and 99, got -1"),
        (torch.zeros(1, 33, dtype=torch.long), "windows of at most 32 tokens, .* got 33; cut them with max_seq_length=32"),
        (3, "expected a path, text, a token array, or an iterable of the module's inputs, got int"),
        ([], "expected at least one input for the module, got an empty iterable"),
        ([{"x": 3}], "calibration input 0: expected a tensor, a tuple or a mapping of tensors, got dict"),
        ([torch.ones(2), torch.full((2,), torch.nan)], "calibration input 1: expected finite values, got NaN or infinity"),
    ],
)
def test_wrong_data_is_refused_at_once(given: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        make_calibration(given, Assets(vocab_size=100, max_positions=32))


def test_files_are_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(SourceError, match=r"bad.npy: expected an integer array \[windows, length\] saved by numpy.save, got"):
        make_calibration(path, Assets())
    np.save(path, np.full((2, 2), 7))
    with pytest.raises(SourceError, match=r"bad.npy: expected tokens between 0 and 4, got 7"):
        make_calibration(path, Assets(vocab_size=5))
    with pytest.raises(SourceError, match=r"missing.txt: expected a .npy array of tokens or UTF-8 text, got"):
        make_calibration(tmp_path / "missing.txt", word_assets())


@pytest.mark.parametrize("option", ["num_calibration_samples", "max_seq_length"])
def test_options_must_be_positive(option: str) -> None:
    with pytest.raises(SourceError, match=f"{option}: expected at least 1, got 0"):
        make_calibration(None, Assets(), **{option: 0})  # type: ignore[arg-type]


def test_language_model_inputs_before_and_after_the_cache_rewrite() -> None:
    calibration = make_calibration(tokens(5, 12), Assets())
    plain, cached = (batches(calibration, language_model(cached=cached), 24) for cached in (False, True))
    assert len(plain) == len(cached) == 3
    assert torch.equal(torch.cat([cached.tensor("input_ids", batch) for batch in range(3)]), tokens(5, 12))
    assert plain.tensor("position_ids", 0).tolist() == cached.tensor("positions", 0).tolist() == [list(range(12))] * 2
    assert plain.tensor("attention_mask", 2).tolist() == [[1] * 12]
    assert cached.tensor("page_table", 0).tolist() == [[0], [1]]
    keys = cached.tensor("keys_0", 0)
    assert keys.shape == (2, 2, 12, 8)
    assert not keys.any()


def test_mappings_with_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    calibration = make_calibration([{"input_ids": tokens(1, 4), "attention_mask": mask}], Assets())
    inputs = batches(calibration, language_model(cached=True))
    assert inputs.tensor("positions", 0).tolist() == [[-1, -1, 0, 1]]
    assert inputs.real(0).tolist() == [[False, False, True, True]]  # type: ignore[union-attr]
    with pytest.raises(SourceError, match=r"calibration input 0: expected a mapping with input_ids \[B, S\]"):
        batches(make_calibration([torch.ones(2, 3)], Assets()), language_model())


def test_tokens_beyond_the_embedding_are_refused_without_assets_too() -> None:
    calibration = make_calibration(torch.full((1, 4), VOCABULARY), Assets())
    with pytest.raises(SourceError, match=f"expected tokens below {VOCABULARY}, the model's vocabulary, got {VOCABULARY}"):
        batches(calibration, language_model())


def module_inputs(given: Any) -> list[Tensor]:
    graph = capture(Gated(), torch.randn(2, 3, 32))
    inputs = batches(make_calibration(given, Assets()), graph)
    return [inputs.tensor(graph.placeholders[0].name, batch) for batch in range(len(inputs))]


@pytest.mark.parametrize("form", ["one", "list", "tuples", "mappings", "generator"])
def test_inputs_of_a_module(form: str) -> None:
    x = [torch.randn(2, 3, 32), torch.randn(1, 3, 32)]
    name = capture(Gated(), torch.randn(2, 3, 32)).placeholders[0].name
    given = {"one": x[0], "list": x, "tuples": [(x[0],), (x[1],)], "mappings": [{name: value} for value in x], "generator": lambda: iter(x)}
    found = module_inputs(given[form])
    assert all(torch.equal(a, b) for a, b in zip(found, x[: len(found)], strict=True))
    assert len(found) == (1 if form == "one" else 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.randn(2, 3, 31)], "calibration input 0: x: expected fp32"),
        ([torch.ones(2, 3, 32, dtype=torch.long)], "calibration input 0: x: expected fp32"),
        ([(torch.randn(2, 3, 32),) * 2], "calibration input 0: .*expected 1 values, got 2 values"),
        (torch.ones(2, 3, dtype=torch.long), "expected inputs x of the module, got tokens; pass calibration= an iterable of its inputs"),
    ],
)
def test_inputs_that_the_module_does_not_take(given: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        module_inputs(given)


class Fixed(nn.Module):
    """Reads tokens of a fixed shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_tokens_for_a_module_that_reads_them() -> None:
    graph = capture(Fixed(), torch.zeros(2, 6, dtype=torch.long))
    inputs = batches(make_calibration(torch.ones(3, 9, dtype=torch.long), Assets()), graph)
    assert inputs.tensor("input_ids", 0).shape == (3, 6)  # cut to the length that was traced
    with pytest.raises(SourceError, match="expected windows of 6 tokens, the length that was traced, got 4"):
        batches(make_calibration(torch.ones(3, 4, dtype=torch.long), Assets()), graph)
