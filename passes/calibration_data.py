"""Reads calibration data from whatever a user gives, and refuses by name what is none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.data import packaged_text
from qcompile.errors import SourceError, TokenizerError
from qcompile.ir.records import Assets

DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512
"""Of windows of text; token arrays keep the length they have."""

Asked = Any
"""None, a path, text, a token array, mappings of inputs, or a callable that returns some of these."""


@dataclass(frozen=True)
class CalibrationData:
    """Token windows, or the inputs of a plain module.

    Attributes:
        name: where it came from, for messages.
        tokens: int64 [W, S], or None.
        samples: what a module is called with, one entry per call: a tensor, a tuple, or a mapping.
    """

    name: str
    tokens: Tensor | None = None
    samples: tuple[Any, ...] = ()

    @property
    def key(self) -> str:
        """Sixteen hex digits over the content."""
        digest = hashlib.sha256()
        for leaf in [self.tokens] if self.tokens is not None else [leaf for sample in self.samples for leaf in _tensors(sample)]:
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def first(self, tokens: int) -> CalibrationData:
        """The windows that hold the first `tokens` tokens, at least one; without windows all samples."""
        if self.tokens is None:
            return self
        return replace(self, tokens=self.tokens[: max(1, tokens // self.tokens.shape[1])])


def read_data(asked: Asked, assets: Assets, samples: int | None, length: int | None) -> CalibrationData:
    """What `make_calibration` was given, checked; see there."""
    if asked is None:
        return _text(packaged_text("calibration"), "packaged text", assets, samples, length)
    if isinstance(asked, str | Path) and Path(asked).suffix == ".npy":
        return _tokens(_load(Path(asked)), str(asked), assets, samples, length)
    if isinstance(asked, Path) or (isinstance(asked, str) and asked.endswith(".txt") and "\n" not in asked):
        return _text(_load_text(Path(asked)), str(asked), assets, samples, length)
    if isinstance(asked, str):
        return _text(asked, "calibration text", assets, samples, length)
    if isinstance(asked, np.ndarray) or (isinstance(asked, Tensor) and not asked.is_floating_point()):
        return _tokens(torch.as_tensor(asked), "calibration tokens", assets, samples, length)
    return _samples(asked, samples or DEFAULT_SAMPLES)


def _load(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise SourceError(f"{path}: expected an integer array [windows, length] saved by numpy.save, got {error}") from None


def _load_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: expected a .npy array of tokens or UTF-8 text, got {error}") from None


def _tokens(tokens: Tensor, name: str, assets: Assets, samples: int | None, length: int | None) -> CalibrationData:
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or not tokens.numel():
        got = f"{tokens.dtype} {list(tokens.shape)}".removeprefix("torch.")
        raise SourceError(f"{name}: expected an integer array [windows, length] of tokens, got {got}")
    tokens = tokens[:samples, :length].long().cpu()
    low, high, size = int(tokens.min()), int(tokens.max()), assets.vocab_size
    if low < 0 or (size and high >= size):
        raise SourceError(
            f"{name}: expected tokens between 0 and {size - 1 if size else 'the vocabulary'}, got {low if low < 0 else high}; "
            "tokenize the text with this model's tokenizer"
        )
    if assets.max_positions and tokens.shape[1] > assets.max_positions:
        raise SourceError(
            f"{name}: expected windows of at most {assets.max_positions} tokens, which the model was made for, got "
            f"{tokens.shape[1]}; cut them with max_seq_length={assets.max_positions}"
        )
    return CalibrationData(name, tokens)


def _text(text: str, name: str, assets: Assets, samples: int | None, length: int | None) -> CalibrationData:
    """Windows of running text without special tokens; what does not fill the last one is dropped."""
    from tokenizers import Tokenizer

    content = assets.files.get("tokenizer.json")
    if content is None:
        raise TokenizerError(
            f"calibration of {assets.name or assets.model_type or 'this model'}: expected a tokenizer for {name}, got none; pass "
            "calibration= token ids [windows, length] (an array, or the path of a .npy file), or inputs to call the module with"
        )
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    size = min(length or DEFAULT_LENGTH, assets.max_positions or DEFAULT_LENGTH, max(len(ids), 1))
    windows = min(samples or DEFAULT_SAMPLES, len(ids) // size)
    if not windows:
        raise SourceError(f"{name}: expected text for at least one window, got {len(ids)} tokens")
    return _tokens(torch.tensor(ids[: windows * size]).view(windows, size), name, assets, samples, length)


def _samples(asked: Any, count: int) -> CalibrationData:
    """Calls of a plain module; a single tensor, mapping or tuple of tensors is one call."""
    given = asked() if callable(asked) and not isinstance(asked, Tensor) else asked
    if isinstance(given, Tensor | Mapping) or (isinstance(given, tuple) and all(isinstance(item, Tensor) for item in given)):
        given = [given]
    if not isinstance(given, Iterable):
        raise SourceError(
            f"calibration: expected a path, text, a token array, or an iterable of the module's inputs, got {type(given).__name__}"
        )
    found = tuple(islice(given, count))
    if not found:
        raise SourceError("calibration: expected at least one input for the module, got an empty iterable")
    for index, sample in enumerate(found):
        _check_sample(sample, index)
    return CalibrationData("calibration", samples=found)


def _check_sample(sample: Any, index: int) -> None:
    leaves = _tensors(sample)
    if not leaves:
        raise SourceError(f"calibration input {index}: expected a tensor, a tuple or a mapping of tensors, got {type(sample).__name__}")
    for leaf in leaves:
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise SourceError(f"calibration input {index}: expected finite values, got NaN or infinity")


def _tensors(sample: Any) -> list[Tensor]:
    values: Sequence[Any] = [sample]
    if isinstance(sample, Mapping):
        values = [sample[key] for key in sorted(sample)]
    elif isinstance(sample, tuple | list):
        values = sample
    return [value for value in values if isinstance(value, Tensor)]
