"""How good a compiled model is: perplexity, and its distance from the model it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qcompile.data import packaged_text
from qcompile.errors import SourceError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qcompile.compiled import CompiledModel
    from qcompile.ir.records import Assets

LogitsFunction = Callable[[Tensor], Tensor]
"""tokens int64 [B, S] -> logits of the next token, float [B, S, V]."""

_LOGITS_AT_ONCE = 1 << 25
"""Logits held at a time per model: 128 MiB in float32, about a 700-token window of a 49,152-token vocabulary."""

_ROWS_AT_ONCE = 256
"""Positions whose log-probabilities are held in float64 at a time: 100 MiB per distribution at that vocabulary."""


@dataclass(frozen=True)
class EvaluationResult:
    """Means over all predicted positions: every token of a window but its first.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: number of predicted positions.
        kl: mean KL(reference ‖ model) of the next-token distribution in nats; None without a reference.
        top1: share of positions where both find the same token most likely; None without a reference.
        reference_perplexity: the reference's own; None without a reference.
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None

    def to_dict(self) -> dict[str, float | int]:
        """The values that were measured, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class _Sums:
    positions: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Account for logits [n, V] against the tokens [n] that followed; returns log-probabilities, float64 [n, V]."""
        log_q = torch.log_softmax(logits.double(), dim=-1)
        self.nll -= float(log_q.gather(1, targets[:, None]).sum())
        self.positions += len(targets)
        return log_q

    def add_pair(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """The same with reference logits [n, V] beside them."""
        log_q = self.add(logits, targets)
        log_p = torch.log_softmax(reference.double(), dim=-1)
        self.reference_nll -= float(log_p.gather(1, targets[:, None]).sum())
        self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        # A token that the reference excludes (-inf) contributes nothing: 0 · log 0 is 0.
        self.divergence += float(torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum())


def evaluate(
    model: LogitsFunction, tokens: Tensor, reference: LogitsFunction | None = None, progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:  # fmt: skip
    """Measure `model` on token windows, and its distance from `reference` where one is given.

    Args:
        model: tokens [B, S] -> logits [B, S, V].
        tokens: [windows, length], integer; rows are independent windows.
        reference: like `model`, over the same vocabulary.
        progress: called with (windows done, windows) after each batch.

    Raises:
        SourceError: if tokens are not a non-empty integer array [windows, length >= 2], or the vocabularies differ.
    """
    tokens = _checked(tokens)
    sums = _Sums()
    done, batch = 0, 1  # one window first: its logits tell the vocabulary, hence how many windows fit
    while done < len(tokens):
        window = tokens[done : done + batch]
        vocabulary = _add_windows(sums, window, model, reference)
        done += len(window)
        batch = max(1, _LOGITS_AT_ONCE // (vocabulary * tokens.shape[1]))
        if progress is not None:
            progress(done, len(tokens))
    return _result(sums, with_reference=reference is not None)


@torch.inference_mode()
def _add_windows(sums: _Sums, window: Tensor, model: LogitsFunction, reference: LogitsFunction | None) -> int:
    targets = window[:, 1:].reshape(-1)
    logits = _predictions(model, window)
    expected = None if reference is None else _predictions(reference, window)
    if expected is not None and expected.shape != logits.shape:
        raise SourceError(f"reference: expected logits over {logits.shape[-1]} tokens like the compiled model, got {expected.shape[-1]}")
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        if expected is None:
            sums.add(logits[rows], targets[rows])
        else:
            sums.add_pair(logits[rows], expected[rows], targets[rows])
    return logits.shape[-1]


def _predictions(model: LogitsFunction, window: Tensor) -> Tensor:
    """Logits of every position that has a next token, as [B·(S-1), V]."""
    return model(window)[:, :-1].flatten(0, 1).cpu()


def _result(sums: _Sums, *, with_reference: bool) -> EvaluationResult:
    count = sums.positions
    perplexity = math.exp(sums.nll / count)
    if not with_reference:
        return EvaluationResult(perplexity, count)
    return EvaluationResult(perplexity, count, sums.divergence / count, sums.agreed / count, math.exp(sums.reference_nll / count))


def _checked(tokens: Tensor) -> Tensor:
    if tokens.dim() != 2 or tokens.is_floating_point() or len(tokens) == 0 or tokens.shape[1] < 2:
        raise SourceError(f"tokens: expected an integer array [windows, length of at least 2], got {tokens.dtype} {list(tokens.shape)}")
    return tokens.long()


def packaged_tokens(tokenizer: Tokenizer, part: Literal["calibration", "evaluation"], *, length: int = 256, windows: int = 16) -> Tensor:
    """Tokens of the packaged text as windows, int64 [windows, length]; without special tokens, so that no window is favoured.

    Raises:
        SourceError: if the text has fewer than `windows · length` tokens.
    """
    ids = tokenizer.encode(packaged_text(part), add_special_tokens=False).ids
    if len(ids) < windows * length:
        asked = f"{windows} windows of {length} tokens"
        raise SourceError(f"packaged {part} text: expected at least {asked}, got {len(ids)} tokens; ask for fewer or shorter windows")
    return torch.tensor(ids[: windows * length]).reshape(windows, length)


def logits_of(model: CompiledModel) -> LogitsFunction:
    """A compiled language model as `evaluate` wants it."""
    return lambda tokens: model(input_ids=tokens)["logits"]


def tokenizer_of(assets: Assets) -> Tokenizer:
    """The tokenizer that a model carries.

    Raises:
        TokenizerError: if it carries none.
    """
    from tokenizers import Tokenizer

    content = assets.files.get("tokenizer.json")
    if content is None:
        name = assets.name or assets.model_type
        raise TokenizerError(f"model {name}: expected a tokenizer.json, got none; pass token ids with --tokens FILE.npy")
    return Tokenizer.from_buffer(content)
