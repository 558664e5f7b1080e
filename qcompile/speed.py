"""How fast a compiled model is and how much memory the process took."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch

from qcompile.errors import CapacityError, QCompileError

if TYPE_CHECKING:
    from qcompile.compiled import CompiledModel

_PREFILLS = 3
"""Prompts timed; the median of so many is not moved by one interruption."""


def speed(model: CompiledModel, *, prompt_tokens: int = 128, new_tokens: int = 64) -> dict[str, float]:
    """Tokens per second of one greedy sequence, after a warm-up that is not counted.

    Each phase is timed by itself: `prefill` is the median over a few prompts, `decode` all new tokens over their time, choosing
    the likeliest included. The prompt is fixed pseudo-random ids; end-of-sequence tokens end nothing, so every model does the same work.

    Raises:
        QCompileError: if the model cannot generate.
        CapacityError: if prompt and new tokens exceed what the model was loaded for.
    """
    if not model.is_causal_lm:
        raise QCompileError(f"bench: expected a causal language model, got {model.assets.model_type or 'a module'}; call it instead")
    if prompt_tokens + new_tokens > model.engine.max_context:
        raise CapacityError(
            f"bench: expected at most {model.engine.max_context} tokens, got {prompt_tokens} of the prompt and {new_tokens} new; "
            "ask for fewer"
        )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, max(model.assets.vocab_size, 1), (prompt_tokens,), generator=generator).tolist()
    _decode(model, _prefill(model, prompt)[1], 1)
    times, logits = zip(*(_prefill(model, prompt) for _ in range(_PREFILLS)), strict=True)
    decoding = _decode(model, logits[-1], new_tokens)
    return {"prefill_tokens_per_second": prompt_tokens / statistics.median(times), "decode_tokens_per_second": new_tokens / decoding}


def _prefill(model: CompiledModel, prompt: list[int]) -> tuple[float, torch.Tensor]:
    """Seconds for a prompt, which begins a new sequence, and its logits [1, V]; reading a value waits for a GPU."""
    started = time.perf_counter()
    logits = model.engine.prefill([prompt])
    int(logits[0].argmax())
    return time.perf_counter() - started, logits


def _decode(model: CompiledModel, logits: torch.Tensor, count: int) -> float:
    """Seconds for `count` tokens after a prompt with these logits."""
    started = time.perf_counter()
    for _ in range(count):
        logits = model.engine.decode([int(logits[0].argmax())])
    int(logits[0].argmax())
    return time.perf_counter() - started


def peak_memory() -> int:
    """The most bytes this process has held resident; on a GPU machine this does not count the GPU's memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
