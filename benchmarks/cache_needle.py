"""Recall from a packed cache: facts stated once or twice are asked for after up to 1,800 tokens, beside the bits that each format takes.

    python -m benchmarks.cache_needle --formats kv kv8 kv2-kivi:window=32 [--texts N] [--calibration CALIB.npy] [--out ROWS.jsonl]
    python -m benchmarks.cache_needle --from ROWS.jsonl [--figure FIGURE.svg]

A text is `The code of abbey is 4921.` for each of 56 random words, in random order; then the same for 42 of the words again; then for
all of them once more, where the four digits are to be recalled. Each digit is predicted from the text before it (teacher forcing); a fact
is recalled if all of its digits are the most likely ones. `kv` is the float model, which recalls 97 %: what it recalls and another format
does not was lost in the cache. Formats are written as for `benchmarks/cache_accuracy.py`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.cache_accuracy import Entry, form, format_of, tell
from benchmarks.cache_figure import RECALL
from qcompile.errors import QCompileError
from qcompile.evaluation import LogitsFunction, logits_of, tokenizer_of
from qcompile.frontend.pinned import smollm2_path
from qcompile.runtime.cache_layers import bits_per_number

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FACTS, AGAIN, DIGITS = 56, 42, 4
HEADER = (
    "| cache | format | bits per number | recalled | stated once | stated twice | digits | seconds |\n|---|---|--:|--:|--:|--:|--:|--:|"
)
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Text:
    """Token ids [S], where the digits of each fact asked for stand [FACTS, DIGITS], and how often it had been stated [FACTS]."""

    ids: Tensor
    places: Tensor
    stated: Tensor


def make_text(words: Sequence[str], encode: Encode, seed: int) -> Text:
    """A text over random words of `words`; `encode` gives token ids, one for each digit and whatever it wants for the rest.

    Raises:
        ValueError: where a digit is not a token of its own.
    """
    draw_from = random.Random(seed)
    facts = [(word, "".join(draw_from.choices("0123456789", k=DIGITS))) for word in draw_from.sample(sorted(words), FACTS)]
    order = draw_from.sample(facts, FACTS) + draw_from.sample(facts, AGAIN)
    asked = draw_from.sample(facts, FACTS)
    ids: list[int] = []
    places: list[list[int]] = []
    for word, code in (*order, *asked):
        ids += encode(f"The code of {word} is ")
        digits = encode(code)
        if len(digits) != DIGITS:
            raise ValueError(f"text: expected a tokenizer with a token for each digit, got {len(digits)} tokens for {code!r}")
        places.append(list(range(len(ids), len(ids) + DIGITS)))
        ids += [*digits, *encode(".\n")]
    return Text(torch.tensor(ids), torch.tensor(places[-FACTS:]), torch.tensor([order.count(fact) for fact in asked]))


def words_of(tokenizer: Tokenizer) -> list[str]:
    """English words of 4 to 8 letters that are one token after a space, in a tokenizer of bytes (`Ġ` is the space)."""
    words = (word[1:] for word in tokenizer.get_vocab() if word.startswith("Ġ"))
    return sorted(word for word in words if 4 <= len(word) <= 8 and word.isascii() and word.isalpha() and word.islower())


def recall(logits: LogitsFunction, texts: Sequence[Text]) -> dict[str, Any]:
    """Shares of facts recalled: of all, of those stated once and twice, and of all digits."""
    correct = torch.stack([_correct(logits, text) for text in texts])
    facts, stated = correct.all(-1), torch.stack([text.stated for text in texts])
    return {
        "recall": _share(facts),
        "once": _share(facts[stated == 1]),
        "twice": _share(facts[stated == 2]),
        "digits": _share(correct),
        "facts": facts.numel(),
        "length": max(len(text.ids) for text in texts),
    }


@torch.inference_mode()
def _correct(logits: LogitsFunction, text: Text) -> Tensor:
    """Which digits are the most likely ones: [FACTS, DIGITS]."""
    best = logits(text.ids[None])[0].argmax(-1)
    return best[text.places - 1] == text.ids[text.places]


def _share(found: Tensor) -> float:
    return float(found.double().mean())


def measure(entry: Entry, model: Path, calibration: Path | None, texts: int) -> dict[str, Any]:
    """Compile one format and ask it; `error` says why it could not be."""
    started = time.perf_counter()
    try:
        compiled = entry.compile(model, calibration, 2048)
    except QCompileError as error:
        return {"error": str(error)}
    tokenizer = tokenizer_of(compiled.assets)
    words = words_of(tokenizer)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    found = recall(logits_of(compiled), [make_text(words, encode, seed) for seed in range(texts)])
    layers = compiled.cache_layers
    return {"form": form(layers), "bits": bits_per_number(layers), **found, "seconds": time.perf_counter() - started}


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| `{row['cache']}` | failed: {row['error'][:200]} | | | | | | |"
    shares = " | ".join(f"{100 * row[name]:.1f} %" for name in ("recall", "once", "twice", "digits"))
    return f"| `{row['cache']}` | {row['form']} | {row['bits']:.3f} | {shares} | {row['seconds']:.0f} |"


def main() -> None:
    """Ask every format, or show what was found."""
    options = _options()
    tell(options, HEADER, line, RECALL, _measured(options))


def _measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for entry in options.formats:
        found = measure(entry, options.model or smollm2_path(), options.calibration, options.texts)
        yield {"cache": entry.text, "by": "qcompile"} | found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", type=format_of, default=[], metavar="FORMAT")
    parser.add_argument("--texts", type=int, default=6, help="texts of 56 facts each; default: 6")
    parser.add_argument("--calibration", type=Path, help="token ids for formats that are calibrated (.npy); default: the packaged text")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory in place of SmolLM2")
    parser.add_argument("--out", type=Path, help="append rows to this file (.jsonl)")
    parser.add_argument("--from", type=Path, dest="rows", help="show rows of this file, measure nothing")
    parser.add_argument("--figure", type=Path, help="draw them (.svg)")
    options = parser.parse_args()
    if options.figure is not None and options.rows is None:
        parser.error("expected --from with --figure: a figure is drawn from rows that were measured")
    return options


if __name__ == "__main__":
    main()
