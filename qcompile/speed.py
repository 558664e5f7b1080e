"""How fast a compiled model is and how much memory the process took."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qcompile.compiled import CompiledModel


def speed(model: CompiledModel, *, prompt_tokens: int = 128, new_tokens: int = 64) -> dict[str, float]:
    """Tokens per second of one greedy sequence after one short warm-up: `prefill` of the prompt, `decode` of what follows.

    The prompt is fixed pseudo-random ids. The time to the first token is prefill; what the others take beyond it is decode.

    Raises:
        CapacityError: if prompt and new tokens exceed what the model was loaded for.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, max(model.assets.vocab_size, 1), (1, prompt_tokens), generator=generator)
    _seconds(model, prompt, 2)
    prefill = _seconds(model, prompt, 1)
    decode = _seconds(model, prompt, new_tokens) - prefill
    return {
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "decode_tokens_per_second": (new_tokens - 1) / decode if decode > 0 else float("nan"),
    }


def _seconds(model: CompiledModel, prompt: torch.Tensor, count: int) -> float:
    """Time for `count` new tokens; end-of-sequence tokens do not end it, so that every model does the same work."""
    started = time.perf_counter()
    model.generate(prompt, max_new_tokens=count, ignore_eos=True)
    return time.perf_counter() - started


def peak_memory() -> int:
    """The most bytes this process has held resident; on a GPU machine this does not count the GPU's memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
