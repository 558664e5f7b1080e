"""The cache table's own parts: formats as text, scores, the front, and a figure that is one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from benchmarks import cache_accuracy
from benchmarks.cache_accuracy import Entry
from benchmarks.cache_figure import KL, RECALL, Measure, Point, draw, pareto
from benchmarks.cache_needle import make_text, recall, words_of
from benchmarks.cache_peers import PEERS
from benchmarks.cache_scores import FloatModel, score
from qcompile.evaluation import LogitsFunction, evaluate
from tests.models import tiny

SVG = "{http://www.w3.org/2000/svg}"
ROW: dict[str, Any] = {
    "cache": "kv8", "by": "qcompile", "form": "int8 g64 sym", "bits": 8.25, "kl": 0.00071, "kl_late": 0.00068, "perplexity": 38.04,
    "top1": 0.985, "seconds": 89.7,
}  # fmt: skip


def test_a_format_is_a_name_and_options_of_compile() -> None:
    entry = Entry.read("kv4-kivi:window=128,values=int3 g32 asym,recipe=nearest")
    assert entry.target == "cpu-fp32-kv4-kivi"
    assert entry.options == {"cache_window": 128, "cache_values": "int3 g32 asym", "recipe": "nearest"}
    assert Entry.read("kv").target == "cpu-fp32"
    assert Entry.read("kv8").options == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [("kv5", "format 'kv5': expected one of kv, kv16, .*, got 'kv5'"), ("kv4:window", "expected option=value, got 'window'")],
)
def test_a_wrong_format_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Entry.read(text)
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        cache_accuracy.format_of(text)


def test_scores_are_those_of_evaluate() -> None:
    generator = torch.Generator().manual_seed(0)
    table, other = torch.randn(2, 9, 9, generator=generator)
    windows = torch.randint(0, 9, (3, 11), generator=generator)
    found = score(lambda ids: table[ids], lambda ids: other[ids], windows)
    expected = evaluate(lambda ids: table[ids], windows, lambda ids: other[ids])
    late = evaluate(lambda ids: table[ids], windows[:, 5:], lambda ids: other[ids])
    for key, value in (("kl", expected.kl), ("perplexity", expected.perplexity), ("top1", expected.top1), ("kl_late", late.kl)):
        assert found[key] == pytest.approx(value, rel=1e-9)
    assert found["float_perplexity"] == pytest.approx(expected.reference_perplexity, rel=1e-9)


def test_a_format_is_measured_against_the_float_model(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    reference = FloatModel(tmp_path)
    windows = torch.randint(3, 100, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference.logits(windows[:1]), reference.model(windows[:1]).logits, rtol=1e-5, atol=1e-6)
    plain, packed = (cache_accuracy.measure(Entry.read(text), tmp_path, None, reference, windows) for text in ("kv", "kv2-kivi:window=8"))
    assert reference.numbers_per_token == 2 * 2 * 2 * 8
    assert plain["bytes_per_token"] == 4 * reference.numbers_per_token
    assert plain["kl"] < 1e-9 < 1e-4 < packed["kl"] < packed["kl_late"], "the first 44 tokens are in 16 bits"
    assert packed["form"] == "int2 t32 asym / int2 g32 asym, 4 first + 8 recent"
    assert packed["bytes_per_sequence"] == 2 * 2 * 2 * (4 + 8 + 31) * 8 * 2
    failed = cache_accuracy.measure(Entry.read("kv8:window=-1"), tmp_path, None, reference, windows)
    assert list(failed) == ["error"]


def test_decoding_step_by_step_is_the_plain_forward_where_the_cache_is_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    tiny("llama").save_pretrained(tmp_path)
    model = FloatModel(tmp_path)
    windows = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("benchmarks.cache_peers.QuantizedCache", lambda *_, **__: DynamicCache())
    found = PEERS["hqq-2"].hidden(model, windows)
    torch.testing.assert_close(found, model.hidden(windows, use_cache=False), rtol=1e-4, atol=1e-5)
    assert PEERS["quanto-4"].bits_per_number == 4 + 0.5 + 0.5


def test_a_peer_that_fails_says_so(tmp_path: Path) -> None:
    options = argparse.Namespace(windows=None, tokens=tmp_path / "none.npy", peers=sys.executable)
    measured = cache_accuracy.run_peer(options, "hqq-2", tmp_path)
    assert list(measured) == ["error"]
    assert "| transformers | failed: " in cache_accuracy.line({"cache": "hqq-2", "by": "transformers"} | measured)


def test_the_last_row_of_a_name_counts(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"cache": "kv4", "kl": 0.01}, ROW | {"kl": 0.0005}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cache_accuracy.read_rows(tmp_path / "rows.jsonl")
    assert [(row["cache"], row["kl"]) for row in found] == [("kv8", 0.0005), ("kv4", 0.01)]
    assert cache_accuracy.line(ROW) == "| `kv8` | int8 g64 sym | 8.250 | 0.0007 | 0.0007 | 38.04 | 98.5 % | 90 |"
    assert cache_accuracy.untimed(cache_accuracy.line(ROW)).endswith(" | 38.04 | 98.5 % |")


def test_the_front_holds_what_nothing_beats() -> None:
    small, beaten, worse, large = Point("a", 3, 0.1, True), Point("b", 4, 0.2, True), Point("c", 4, 0.05, True), Point("d", 8, 0.001, False)
    assert pareto([large, beaten, worse, small], KL) == [small, worse, large]
    assert pareto([large, beaten, worse, small], RECALL) == [small, beaten]


@pytest.mark.parametrize("measure", [KL, RECALL])
def test_the_figure_names_every_format_inside_it(measure: Measure) -> None:
    rows = [ROW | {"cache": f"kv{n}:window={n}", "bits": 2 + n * n / 40, "kl": 10 ** (-n / 6), "recall": n / 19} for n in range(20)]
    rows += [ROW | {"cache": "quanto <4>", "by": "peer", "bits": 5.0, "kl": 0.5, "recall": 0.5}]
    root = ElementTree.fromstring(draw([*rows, {"cache": "x", "by": "qcompile", "error": "no"}], measure))
    texts = {"".join(text.itertext()): text for text in root.iter(f"{SVG}text")}
    names = [f"kv{n}:window={n}" for n in range(20)] + ["peer quanto <4>"]
    assert {*names, measure.title, measure.axis} <= set(texts)
    assert len(list(root.iter(f"{SVG}circle"))) == 20
    places = [(float(texts[name].get("x", "nan")), float(texts[name].get("y", "nan"))) for name in names]
    assert all(0 < x < 900 and 0 < y < 540 for x, y in places)
    assert len(set(places)) == len(names)
    heights = [float(circle.get("cy", "nan")) for circle in root.iter(f"{SVG}circle")]
    assert heights == sorted(heights, reverse=measure.more), "upwards is more"
    with pytest.raises(ValueError, match=f"at least one row with bits and {measure.key}, got none"):
        draw([{"cache": "x", "by": "qcompile", "error": "no"}], measure)


def letters(text: str) -> list[int]:
    """A tokenizer of single characters."""
    return [ord(letter) for letter in text]


WORDS = [f"{a}{b}word" for a in "abcdefghijkl" for b in "abcdefghij"]


def test_a_text_asks_for_every_fact_it_states() -> None:
    text = make_text(WORDS, letters, seed=3)
    written = "".join(map(chr, text.ids.tolist()))
    lines = written.splitlines()
    assert len(lines) == 56 + 42 + 56
    assert sorted(set(lines[:56])) == sorted(lines[98:])
    assert len(set(lines[56:98])) == 42
    assert lines[:56] != lines[98:]
    for line, places, stated in zip(lines[98:], text.places.tolist(), text.stated.tolist(), strict=True):
        assert line.endswith(f" is {''.join(written[place] for place in places)}.")
        assert lines[:98].count(line) == stated
    assert torch.equal(make_text(WORDS, letters, seed=3).ids, text.ids)
    assert not torch.equal(make_text(WORDS, letters, seed=4).ids[:200], text.ids[:200])
    with pytest.raises(ValueError, match="a token for each digit, got 1 tokens for"):
        make_text(WORDS, lambda text: [len(text)], seed=0)


def test_a_fact_is_recalled_if_all_its_digits_are() -> None:
    texts = [make_text(WORDS, letters, seed) for seed in range(2)]

    def knows_all_but(missing: Tensor) -> LogitsFunction:
        """Logits that predict what follows, but not at the positions `missing`."""

        def logits(ids: Tensor) -> Tensor:
            following = ids.roll(-1, 1)
            following[:, missing] = 0
            return torch.nn.functional.one_hot(following, 128).float()

        return logits

    assert recall(knows_all_but(torch.tensor([], dtype=torch.long)), texts)["recall"] == 1
    first = texts[:1]
    once = first[0].places[first[0].stated == 1]
    found = recall(knows_all_but(once[:8, 2] - 1), first)
    assert (found["recall"], found["once"], found["twice"]) == pytest.approx((1 - 8 / 56, 1 - 8 / 14, 1))
    assert found["digits"] == pytest.approx(1 - 8 / 224)
    assert found["facts"] == 56


def test_words_are_single_tokens() -> None:
    from tokenizers import Tokenizer, models

    vocabulary = ["Ġhouse", "house", "Ġtree", "ĠTree", "Ġabc", "Ġtree1", "Ġgrün", "Ġmountains"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(vocabulary)}, []))
    assert words_of(tokenizer) == ["house", "tree"]


def test_the_document_shows_what_was_measured() -> None:
    """The table and the figure are those that the script makes of the rows kept beside them."""
    root = Path(__file__).resolve().parent.parent
    rows = cache_accuracy.read_rows(root / "benchmarks" / "results" / "2026-11-21-cache-smollm2.jsonl")
    document = (root / "docs" / "kv-cache.md").read_text().splitlines()
    assert [line for line in (cache_accuracy.untimed(cache_accuracy.line(row)) for row in rows) if line not in document] == []
    assert (root / "docs" / "kv-cache.svg").read_text() == draw(rows, KL)
