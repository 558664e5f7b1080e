"""How fast a compiled model is and how much memory the process took."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qcompile.compiled import CompiledModel


def speed(model: CompiledModel, *, prompt_tokens: int = 128, new_tokens: int = 64) -> dict[str, float]:
    """Tokens per second of one greedy sequence after one short warm-up: `prefill` of the prompt, `decode` of what follows.

    The prompt is fixed pseudo-random ids; the time to the first token counts as prefill.

    Raises:
        CapacityError: if prompt and new tokens exceed what the model was loaded for.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, max(model.assets.vocab_size, 1), (1, prompt_tokens), generator=generator)
    _arrivals(model, prompt[:, :8], 2)
    started = time.perf_counter()
    arrivals = _arrivals(model, prompt, new_tokens)
    decoding = arrivals[-1] - arrivals[0]
    return {
        "prefill_tokens_per_second": prompt_tokens / (arrivals[0] - started),
        "decode_tokens_per_second": (len(arrivals) - 1) / decoding if decoding > 0 else float("nan"),
    }


def _arrivals(model: CompiledModel, prompt: torch.Tensor, count: int) -> list[float]:
    """When each new token came; end-of-sequence tokens do not end it, so that every model does the same work."""
    pieces: Any = model.generate(prompt, max_new_tokens=count, stream=True, ignore_eos=True)
    return [time.perf_counter() for _ in pieces]


def peak_memory() -> int:
    """The most bytes this process has held resident; on a GPU machine this does not count the GPU's memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
