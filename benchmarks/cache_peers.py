"""One row of the cache table by another library: the cache of transformers with the backend quanto or hqq.

    python -m benchmarks.cache_peers NAME --model DIR --tokens TOKENS.npy [--windows N]

Runs in an environment that has the library; prints one line of JSON. Windows are decoded token by token side by side after a prompt of four
(hqq packs tokens in fours), so that position t sees the cache as it stands at step t: up to 127 tokens in 16 bits, and all tokens packed,
those of before once more, each time 128 are there. No group of these settings reaches from one window into another.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from benchmarks.accuracy_peers import read
from benchmarks.cache_scores import FloatModel, score

CONTEXT = 4096
"""As `qcompile.runtime.cache_layers` counts bits."""
GROUP, RESIDUAL = 64, 128
"""The library's defaults."""
PROMPT = 4
"""Tokens read at once, before decoding."""


@dataclass(frozen=True)
class Peer:
    """A setting of `QuantizedCache`; the axis is what the library's documentation asks for with the backend."""

    backend: str
    bits: int
    axis: int

    @property
    def text(self) -> str:
        """As the table shows it."""
        return f"transformers QuantizedCache, {self.backend}, int{self.bits} g{GROUP} asym, {RESIDUAL} recent"

    @property
    def bits_per_number(self) -> float:
        """Codes, a scale and a zero point of 16 bits each per group, and the recent tokens in 16 bits."""
        return self.bits + 2 * 16 / GROUP + 16 * RESIDUAL / CONTEXT

    def hidden(self, model: FloatModel, windows: Tensor) -> Tensor:
        """Before the head, token by token: [W, S] -> [W, S, K]."""
        cache = QuantizedCache(
            self.backend, model.model.config, nbits=self.bits, axis_key=self.axis, axis_value=self.axis, q_group_size=GROUP,
            residual_length=RESIDUAL,
        )  # fmt: skip
        parts = windows.tensor_split([*range(PROMPT, windows.shape[1])], dim=1)
        return torch.cat([model.hidden(part, past_key_values=cache, use_cache=True) for part in parts], dim=1)


PEERS = {
    "quanto-4": Peer("quanto", 4, 0),
    "hqq-4": Peer("hqq", 4, 1),
    "quanto-2": Peer("quanto", 2, 0),
    "hqq-2": Peer("hqq", 2, 1),
}


def measure(peer: Peer, model: FloatModel, windows: Tensor) -> dict[str, Any]:
    """The row: distance from the model with a float cache."""
    started = time.perf_counter()
    hidden = peer.hidden(model, windows)
    places = {window.numpy().tobytes(): index for index, window in enumerate(windows)}
    scores = score(lambda ids: model.head(hidden[[places[row.numpy().tobytes()] for row in ids]]), model.logits, windows)
    size = {"bits": peer.bits_per_number, "bytes_per_token": peer.bits_per_number * model.numbers_per_token / 8}
    return {"form": peer.text, **size, **scores, "seconds": time.perf_counter() - started}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--windows", type=int)
    options = parser.parse_args()
    print(json.dumps(measure(PEERS[options.name], FloatModel(options.model), read(options.tokens, options.windows))))


if __name__ == "__main__":
    main()
