"""generate(): prompts of any kind through an engine, token by token, with stops and streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import QCompileError, TokenizerError
from qcompile.ir.lowered import Engine
from qcompile.runtime.rows import Row, StopRules
from qcompile.runtime.sampling import Sampler, SamplingParameters
from qcompile.runtime.schedule import run_rows
from qcompile.runtime.tokenizer import TextStream, Tokenizer


def _all(items: Sequence[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


def _ids(row: Any) -> list[int]:
    """One sequence of token ids as a list.

    Raises:
        QCompileError: for anything but integers in a row.
    """
    integers = isinstance(row, Tensor) and row.dim() == 1 and not (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)
    plain = (
        isinstance(row, Sequence) and not isinstance(row, str) and all(isinstance(item, int) and not isinstance(item, bool) for item in row)
    )
    if not integers and not plain:
        got = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else f"{type(row).__name__} {str(row)[:40]!r}"
        raise QCompileError(f"generate: expected a sequence of integer token ids, got {got}; give texts or token ids, not both in one list")
    return [int(token) for token in row]


def _require_known(options: Mapping[str, Any]) -> None:
    known = ("stop", "stop_tokens", "ignore_eos", *(item.name for item in fields(SamplingParameters)))
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise QCompileError(f"generate: expected options of {', '.join(known)}, got {unknown!r}")


class Generator:
    """What `CompiledModel.generate` is: the forms of prompts, as many at a time as the cache was made for."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer` may be None: then only token ids are served."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)

    def __call__(
        self, prompt: Any, *, max_new_tokens: int = 128, stop: str | Sequence[str] = (), stop_tokens: Sequence[int] = (),
        ignore_eos: bool = False, stream: bool = False, **sampling: Any,
    ) -> Any:  # fmt: skip
        """Generate after `prompt`; see `CompiledModel.generate` for its forms."""
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        tokens = frozenset(stop_tokens) | (frozenset() if ignore_eos else self.eos_token_ids)
        rules = StopRules(max_new_tokens, tokens, tuple(filter(None, strings)))
        _require_known(sampling)
        sampler = Sampler(SamplingParameters(**sampling))
        kind, prompts = self._prompts(prompt)
        if stream:
            if kind != "one text":
                raise QCompileError(f"generate: expected one text or one conversation with stream=True, got {kind}")
            return self._stream(prompts[0], rules, sampler)
        results = self._all(prompts, kind, rules, sampler)
        return results[0] if kind == "one text" else results

    def _stream(self, prompt: list[int], rules: StopRules, sampler: Sampler) -> Iterator[str]:
        row = Row(prompt, TextStream(self._text_tokenizer()))
        pieces = run_rows(self.engine, [row], rules, sampler)
        return (piece for _, piece in pieces if piece)

    def _all(self, prompts: Sequence[list[int]], kind: str, rules: StopRules, sampler: Sampler) -> list[Any]:
        wants_text = kind != "token ids" or bool(rules.strings)
        rows = [Row(prompt, TextStream(self._text_tokenizer()) if wants_text else None) for prompt in prompts]
        pieces: list[list[str]] = [[] for _ in rows]
        for index, piece in run_rows(self.engine, rows, rules, sampler):
            pieces[index].append(piece)
        return [row.tokens for row in rows] if kind == "token ids" else ["".join(part) for part in pieces]

    def _prompts(self, prompt: Any) -> tuple[str, list[list[int]]]:
        """The kind of a prompt and its token lists: one text, several texts, or token ids."""
        if isinstance(prompt, str):
            return "one text", [self._text_tokenizer().encode(prompt)]
        if isinstance(prompt, Tensor) and prompt.dim() in (1, 2):
            return "token ids", [_ids(row) for row in (prompt if prompt.dim() == 2 else prompt.unsqueeze(0))]
        if isinstance(prompt, Sequence) and len(prompt):
            if _all(prompt, Mapping):
                return "one text", [self._text_tokenizer().encode_chat(prompt)]
            if _all(prompt, str):
                return "several texts", [self._text_tokenizer().encode(text) for text in prompt]
            if _all(prompt, int):
                return "token ids", [_ids(prompt)]
            if all(isinstance(chat, Sequence) and chat and _all(chat, Mapping) for chat in prompt):
                return "several texts", [self._text_tokenizer().encode_chat(chat) for chat in prompt]
            return "token ids", [_ids(row) for row in prompt]
        got = f"a tensor of {prompt.dim()} dimensions" if isinstance(prompt, Tensor) else f"{type(prompt).__name__} {str(prompt)[:40]!r}"
        raise QCompileError(f"generate: expected a text, a list of texts, chat messages, or token ids [B, S] or in lists, got {got}")

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "generate: expected a model with tokenizer.json for text, got one without; pass token ids, or compile from a "
                "checkpoint that has a tokenizer"
            )
        return self.tokenizer
