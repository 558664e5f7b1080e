"""How far a model with a packed cache is from the float model, whoever made the cache: shared by our rows and those of other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qcompile.evaluation import EvaluationResult, LogitsFunction, evaluate


class FloatModel:
    """A Hugging Face model in float32 without a cache of its own; what comes before the head is computed once per window."""

    def __init__(self, path: Path) -> None:
        """Read a directory, or a .gguf file."""
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=torch.float32, **where)
        self.model = model.eval()
        self.known: dict[bytes, Tensor] = {}

    @property
    def numbers_per_token(self) -> int:
        """Numbers in the keys and values of one token, over all layers."""
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * size)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, **options: Any) -> Tensor:
        """Before the head: tokens [B, S] -> [B, S, K]; `options` are those of the decoder, such as `past_key_values`."""
        found: Tensor = self.model.get_decoder()(tokens, **options).last_hidden_state
        return found

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """[B, S, K] -> logits [B, S, V]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [B, S, V]; the second time they cost the head alone."""
        key = tokens.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.hidden(tokens, use_cache=False)
        return self.head(self.known[key])


def score(
    logits: LogitsFunction, reference: LogitsFunction, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Distance of `logits` from `reference` on windows [W, S]: means over all positions, and over the second half of each window.

    A cache that keeps many of the last tokens in 16 bits shows what it costs in the second half only.
    """
    halves: tuple[list[EvaluationResult], list[EvaluationResult]] = ([], [])
    middle = windows.shape[1] // 2
    for index in range(len(windows)):
        window = windows[index : index + 1]
        found, expected = logits(window), reference(window)
        for results, part in zip(halves, (slice(0, middle + 1), slice(middle, None)), strict=True):
            results.append(_part(found, expected, window, part))
        if progress is not None:
            progress(index + 1, len(windows))
    together = [*halves[0], *halves[1]]
    return {
        "kl": _mean(together, "kl"),
        "kl_late": _mean(halves[1], "kl"),
        "perplexity": math.exp(_mean(together, "perplexity", math.log)),
        "float_perplexity": math.exp(_mean(together, "reference_perplexity", math.log)),
        "top1": _mean(together, "top1"),
        "windows": len(windows),
        "length": windows.shape[1],
    }


def _part(found: Tensor, expected: Tensor, window: Tensor, part: slice) -> EvaluationResult:
    return evaluate(lambda _: found[:, part], window[:, part], lambda _: expected[:, part])


def _mean(results: Sequence[EvaluationResult], name: str, of: Callable[[float], float] = float) -> float:
    """Over positions: results weigh as many as they predicted."""
    return sum(of(getattr(result, name)) * result.tokens for result in results) / sum(result.tokens for result in results)
