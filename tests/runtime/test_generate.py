"""generate(): stops, streams, ragged batches, forms of prompts, against an engine that plays a script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from qcompile.errors import CapacityError, QCompileError, TokenizerError
from qcompile.ir.records import Assets, MemoryPlan
from qcompile.runtime.generate import Generator
from qcompile.runtime.rows import first_stop, longest_border
from qcompile.runtime.tokenizer import TextStream, Tokenizer

EOS = 256


@dataclass
class Played:
    """A sequence of the script: which text it is, how far it is, what it took so far."""

    text: int
    length: int
    step: int = 0


class Script:
    """An engine that answers with the bytes of a text, one token per byte, then with the end of sequence.

    Prompts get the texts in turn. `pages` tokens of all sequences fit, if given.
    """

    name = "script"
    max_context = 64

    def __init__(self, *texts: str, max_batch: int = 4, pages: int = 1 << 20) -> None:
        self.texts = [list(text.encode()) for text in texts]
        self.max_batch, self.pages = max_batch, pages
        self.played: dict[int, Played] = {}
        self.fed: list[dict[int, int]] = []
        self.joined: list[list[int]] = []
        self.suspended = 0

    memory = MemoryPlan()

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted(self.played))

    @property
    def state(self) -> list[int]:
        return [self.played[row].length for row in self.rows]

    def prepare(self) -> None: ...

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        raise NotImplementedError

    prefill = decode = join = fork = save = restore = forward

    def join_all(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        free = [row for row in range(self.max_batch) if row not in self.played]
        assert len(prompts) <= len(free)
        assert sum(self.state) + sum(map(len, prompts)) <= self.pages
        rows = free[: len(prompts)]
        first = sum(map(len, self.joined))
        self.joined.append(rows)
        self.played |= {row: Played(first + place, len(prompts[place])) for place, row in enumerate(rows)}
        return rows, self._logits(rows)

    def leave(self, row: int) -> None:
        del self.played[row]

    def has_room(self, lengths: Sequence[int]) -> bool:
        live = len(self.played) + len(lengths)
        return live <= self.max_batch and sum(self.state) + sum(lengths) + live <= self.pages

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        if sum(self.state) + len(tokens) > self.pages:
            raise CapacityError("pages")
        self.fed.append(dict(tokens))
        for row in tokens:
            played = self.played[row]
            played.step, played.length = played.step + 1, played.length + 1
        return self._logits(list(tokens))

    def suspend(self, row: int) -> Played:
        self.suspended += 1
        return self.played.pop(row)

    def resume(self, saved: Any) -> int:
        row = next(row for row in range(self.max_batch) if row not in self.played)
        self.played[row] = saved
        return row

    def _byte(self, played: Played) -> int:
        text = self.texts[played.text % len(self.texts)]
        return text[played.step] if played.step < len(text) else EOS

    def _logits(self, rows: Sequence[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([self._byte(self.played[row]) for row in rows]), 300).float()


@pytest.fixture(scope="module")
def assets() -> Assets:
    """A tokenizer with one token per byte, and a chat template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    order = bytes_to_unicode()
    fast = FastTokenizer(models.BPE(vocab={order[byte]: byte for byte in range(256)} | {"<eos>": EOS}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    assert len(alphabet) == 256
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}[{{ m.role "
        "}}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    files = {
        "tokenizer.json": fast.to_str().encode(),
        "chat_template.jinja": template.encode(),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "<eos>"}}).encode(),
    }
    return Assets(files, (EOS,), name="bytes")


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    spare = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + index) for index, byte in enumerate(spare)}


def generator(assets: Assets, *texts: str, max_batch: int = 4) -> Generator:
    return Generator(Script(*texts, max_batch=max_batch), Tokenizer(assets), assets.eos_token_ids)


def test_a_text_goes_in_and_a_text_comes_out(assets: Assets) -> None:
    assert generator(assets, "Paris.")("The capital", max_new_tokens=30) == "Paris."
    assert generator(assets, "Paris.")("The capital", max_new_tokens=3) == "Par"


def test_streaming_never_splits_a_character(assets: Assets) -> None:
    text = "naïve 日本語 🙂 " * 2
    pieces = list(generator(assets, text)("x", max_new_tokens=200, stream=True))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) > 10


def test_a_stream_equals_decoding_at_once(assets: Assets) -> None:
    tokenizer = Tokenizer(assets)
    stream = TextStream(tokenizer)
    tokens = tokenizer.encode("čtyřicet dva — 42 ✓" * 4)
    assert "".join(stream.push(token) for token in tokens) + stream.finish() == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("stop", "expected"), [("END", "one two "), (["two", "END"], "one "), ("ENDLESS", "one two END three"), ("one", "")]
)
def test_stop_strings_cut_across_tokens_and_are_not_given_out(assets: Assets, stop: str | list[str], expected: str) -> None:
    assert generator(assets, "one two END three")("x", stop=stop) == expected
    assert "".join(generator(assets, "one two END three")("x", stop=stop, stream=True)) == expected


def test_borders_of_stop_strings() -> None:
    assert longest_border("abcEN", ["END", "NO"]) == 2
    assert longest_border("abc", ["END"]) == 0
    assert first_stop("xENDyNO", ["NO", "END"]) == 1


def test_stop_tokens_and_ignored_ends(assets: Assets) -> None:
    assert generator(assets, "abcdef")("x", stop_tokens=[ord("d")]) == "abc"
    assert generator(assets, "ab")([1, 2], max_new_tokens=4, ignore_eos=True) == [[97, 98, EOS, EOS]]


def script_of(made: Generator) -> Script:
    assert isinstance(made.engine, Script)
    return made.engine


def test_a_prompt_joins_when_another_leaves(assets: Assets) -> None:
    made = generator(assets, "a", "bcde", "f", "", "g", max_batch=2)
    assert made(["1", "22", "333", "4", "5"]) == ["a", "bcde", "f", "", "g"]
    script = script_of(made)
    assert script.joined == [[0, 1], [0], [0], [0]]
    assert script.fed == [{0: 97, 1: 98}, {1: 99, 0: 102}, {1: 100}, {1: 101, 0: 103}], "each takes the token that it chose"
    assert script.played == {}


def test_the_one_that_joined_last_makes_room_and_returns(assets: Assets) -> None:
    texts = ["abcdefgh", "ijklmnop", "qrstuvwx", "yz"]
    made = Generator(Script(*texts, pages=20), Tokenizer(assets), assets.eos_token_ids)
    assert made(["1111", "2222", "3333", "4444"]) == texts
    script = script_of(made)
    assert script.suspended > 0
    assert script.played == {}
    order = [rows for rows in script.joined if rows]
    assert sum(map(len, order)) == 4, "no prompt is read twice"


def test_one_sequence_too_many_for_the_pages_is_an_error(assets: Assets) -> None:
    made = Generator(Script("abcdefgh", pages=6), Tokenizer(assets), assets.eos_token_ids)
    with pytest.raises(CapacityError, match="pages"):
        made(["1111"])


def test_generating_starts_over(assets: Assets) -> None:
    made = generator(assets, "abc", max_batch=1)
    stream = made("1", stream=True)
    assert next(stream) == "a"
    assert made("1") == "abc"


def test_a_row_draws_the_same_whoever_is_beside_it(assets: Assets) -> None:
    prompts = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
    results = [
        generator(assets, "abc", max_batch=size)(prompts, temperature=20.0, seed=5, max_new_tokens=6, ignore_eos=True) for size in (1, 2, 5)
    ]
    assert results[0] == results[1] == results[2]
    assert len({tuple(tokens) for tokens in results[0]}) == 5, "and each prompt draws its own"


def test_ids_of_every_form(assets: Assets) -> None:
    for prompt in (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3]], [torch.tensor([1, 2]), torch.tensor([3])]):
        assert generator(assets, "a", "bc")(prompt) == [[97], [98, 99]]


def test_chat_goes_through_the_template(assets: Assets) -> None:
    tokenizer = Tokenizer(assets)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "[user]hi<eos>[assistant]"
    assert generator(assets, "yes")([{"role": "user", "content": "hi"}]) == "yes"
    with pytest.raises(TokenizerError, match="bytes: expected messages that the chat template takes, got an error: no tools"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}])


def test_a_template_cannot_reach_the_interpreter(assets: Assets) -> None:
    hostile = Assets(assets.files | {"chat_template.jinja": b"{{ ''.__class__.__mro__[1].__subclasses__() }}"}, name="hostile")
    with pytest.raises(TokenizerError, match="hostile: expected messages that the chat template takes"):
        Tokenizer(hostile).render_chat([{"role": "user", "content": "x"}])


def test_what_cannot_be_served_says_so(assets: Assets) -> None:
    with pytest.raises(CapacityError, match=r"expected a prompt of at most 64 tokens, got 65; shorten it, or load with max_context=193"):
        generator(assets, "a")([[1] * 65])
    with pytest.raises(TokenizerError, match=r"expected a model with tokenizer\.json for text"):
        Generator(Script("a"), None, [])("text")
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json, got none"):
        Tokenizer(Assets(name="bare"))
    with pytest.raises(TokenizerError, match="expected a chat template, got none"):
        Tokenizer(Assets({"tokenizer.json": assets.files["tokenizer.json"]}, name="bare")).render_chat([])
    with pytest.raises(QCompileError, match=r"expected a text, a list of texts, .* or token ids \[B, S\] or in lists, got float"):
        generator(assets, "a")(1.5)
    with pytest.raises(QCompileError, match="expected one text or one conversation with stream=True, got token ids"):
        generator(assets, "a")([1], stream=True)
    with pytest.raises(QCompileError, match="max_new_tokens=0: expected at least 1"):
        generator(assets, "a")("x", max_new_tokens=0)
    with pytest.raises(QCompileError, match="expected at least one token in each prompt"):
        generator(assets, "a")([[]])


def test_a_row_ends_when_the_cache_is_full(assets: Assets) -> None:
    (tokens,) = generator(assets, "z" * 100)([[1] * 60], max_new_tokens=50)
    assert len(tokens) == 5  # four tokens are stored after the prompt, and the logits of the last give one more


def test_a_stream_refuses_a_long_prompt_before_it_is_read(assets: Assets) -> None:
    with pytest.raises(CapacityError, match="expected a prompt of at most 64 tokens, got 65"):
        generator(assets, "a")("x" * 65, stream=True)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.ones(1, 2, 3, dtype=torch.long), r"token ids \[B, S\] or in lists, got a tensor of 3 dimensions"),
        (torch.ones(1, 2), r"expected a sequence of integer token ids, got torch\.float32 \[2\]"),
        ([torch.tensor([1.5])], r"expected a sequence of integer token ids, got torch\.float32"),
        ([[1], "text"], "expected a sequence of integer token ids, got str 'text'; give texts or token ids, not both in one list"),
        ([[1, 2.5]], "expected a sequence of integer token ids, got list"),
        ([True, False], "expected a sequence of integer token ids, got list"),
        ([], "expected a text, a list of texts, chat messages, or token ids"),
    ],
)
def test_prompts_of_no_known_form_are_refused(prompt: object, message: str, assets: Assets) -> None:
    with pytest.raises(QCompileError, match=message):
        generator(assets, "a")(prompt)


def test_options_that_do_not_exist_are_named(assets: Assets) -> None:
    with pytest.raises(QCompileError, match=r"expected options of stop, stop_tokens, ignore_eos, temperature, .* got 'temp'"):
        generator(assets, "a")("x", temp=1.0)
