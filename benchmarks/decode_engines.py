"""An engine in a process of its own, which decodes when it is told to: what `benchmarks.decode_cpu` compares.

    python -m benchmarks.decode_engines qcompile ARTIFACT --threads 1
    python -m benchmarks.decode_engines llama.cpp FILE.gguf --threads 1

Reads lines of JSON, `{"decode": 64}` or `{"prefill": 256}`, and answers each with a line: seconds, and the tokens that came. The first
line that it prints says what it is, and how many bytes of weights and cache a token reads.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PROMPT = list(range(1000, 1032))
CONTEXT = 512


class Decoder(Protocol):
    """One sequence after the other, greedily."""

    name: str
    weight_bytes: int
    cache_bytes: int
    """Of the weights that a token reads, and of one token in the cache."""

    def prefill(self, tokens: list[int]) -> int:
        """Begin anew with these tokens; the most likely next one."""

    def decode(self, token: int) -> int:
        """One more; the most likely next one."""


class Ours:
    """A saved artifact in the native engine."""

    def __init__(self, artifact: Path, threads: int) -> None:
        import torch

        import qcompile

        torch.set_num_threads(threads)
        model = qcompile.load(artifact, engine="native", max_context=CONTEXT)
        self._engine = model.engine
        self.name = f"qcompile {qcompile.__version__} ({type(self._engine).name})"
        self.weight_bytes, self.cache_bytes = weight_bytes(model), model.kv_bytes_per_token

    def prefill(self, tokens: list[int]) -> int:
        """As `Decoder`."""
        return int(self._engine.prefill([tokens])[0].numpy().argmax())

    def decode(self, token: int) -> int:
        """As `Decoder`."""
        return int(self._engine.decode([token])[0].numpy().argmax())


def weight_bytes(model: Any) -> int:
    """Bytes of the constants that a decode step reads, as the artifact stores them: all but a row of an embedding that is no head."""
    from qcompile.ir.memory import buffers_in

    entry, constants = model.contents.plan.entries["decode"], model.contents.constants
    read = {
        name
        for step in entry.steps
        if "embedding" not in step.operator
        for name in buffers_in([*step.args, *step.kwargs.values()])
        if name in constants
    }
    return sum(math.prod(constants[name].shape) * constants[name].dtype.itemsize for name in read)


class LlamaCpp:
    """llama.cpp by its C interface, logits looked at where they are: as little around it as there can be."""

    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp

        from benchmarks.gguf_models import bytes_of_a_token

        self._cpp = llama_cpp
        self._model = llama_cpp.Llama(str(model), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
        self._context, self._vocabulary = self._model.ctx, self._model.n_vocab()
        self.name = f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"
        settings = self._model.metadata
        heads, layers = (int(settings[f"llama.{key}"]) for key in ("attention.head_count_kv", "block_count"))
        size = int(settings["llama.embedding_length"]) // int(settings["llama.attention.head_count"])
        self.weight_bytes, self.cache_bytes = bytes_of_a_token(model), 2 * 2 * layers * heads * size

    def prefill(self, tokens: list[int]) -> int:
        """As `Decoder`."""
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
        return self._evaluate(tokens)

    def decode(self, token: int) -> int:
        """As `Decoder`."""
        return self._evaluate([token])

    def _evaluate(self, tokens: list[int]) -> int:
        import numpy as np

        given = (self._cpp.llama_token * len(tokens))(*tokens)
        if self._cpp.llama_decode(self._context, self._cpp.llama_batch_get_one(given, len(tokens))):
            sys.exit(f"benchmarks.decode_engines: llama.cpp: expected to decode {len(tokens)} tokens, got a failure; shorten the prompt")
        logits = self._cpp.llama_get_logits_ith(self._context, -1)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, shape=(self._vocabulary,)).argmax())


ENGINES: dict[str, Callable[[Path, int], Decoder]] = {"qcompile": Ours, "llama.cpp": LlamaCpp}


def decode(engine: Decoder, count: int) -> dict[str, Any]:
    """Seconds of so many steps after the prompt, and their tokens."""
    tokens = [engine.prefill(PROMPT)]
    started = time.perf_counter()
    for _ in range(count):
        tokens.append(engine.decode(tokens[-1]))
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def prefill(engine: Decoder, count: int) -> dict[str, Any]:
    """Seconds of a prompt of so many tokens, and the one behind it."""
    prompt = [1000 + place * 37 % 20000 for place in range(count)]
    started = time.perf_counter()
    token = engine.prefill(prompt)
    return {"seconds": time.perf_counter() - started, "tokens": [token]}


def main() -> None:
    """Answer until there is nothing more to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    started = time.perf_counter()
    engine = ENGINES[options.engine](options.model, options.threads)
    about = {"name": engine.name, "weight_bytes": engine.weight_bytes, "cache_bytes": engine.cache_bytes}
    print(json.dumps(about | {"load_seconds": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        ((kind, count),) = json.loads(line).items()
        print(json.dumps({"decode": decode, "prefill": prefill}[kind](engine, count)), flush=True)


if __name__ == "__main__":
    main()
