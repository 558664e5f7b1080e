"""Calibration data: what a user gives, checked once, and handed to a graph as the tensors it takes at that stage of its compilation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.data import packaged_text
from qcompile.errors import QCompileError, SourceError, TokenizerError
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.ir.structure import flatten

DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512
"""Of windows of text; token arrays keep the length they have."""

Sample = Mapping[str, Tensor]
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


@dataclass
class Calibration:
    """Calibration data that is read when a pass first needs it, and then kept."""

    read: Callable[[], CalibrationData]
    _data: CalibrationData | None = field(default=None, repr=False)

    @property
    def data(self) -> CalibrationData:
        """The data.

        Raises:
            SourceError: if it cannot be read, or is not what calibration data has to be.
            TokenizerError: if it is text, and the model has no tokenizer.
        """
        if self._data is None:
            self._data = self.read()
        return self._data

    @property
    def key(self) -> str:
        """What tells this data from other: a hash of its content."""
        return self.data.key


def make_calibration(
    asked: Asked, assets: Assets, *, num_calibration_samples: int | None = None, max_seq_length: int | None = None
) -> Calibration:
    """What the user gave, as calibration data for a model with these assets.

    Args:
        asked: a token array int [W, S] (tensor, numpy array, or path of a .npy file), text (or path of a .txt file), mappings,
            tuples or tensors that a plain module is called with (an iterable, or a callable that returns one); None is the packaged text.
        assets: the model's: text needs its tokenizer.
        num_calibration_samples: windows or calls that are used at most; by default all of an array, 64 of anything else.
        max_seq_length: tokens of a window at most; by default those of an array, 512 of text.

    Raises:
        SourceError: for anything else, naming what came. None is read only when a pass needs data; all else is read here.
    """
    for option, value in (("num_calibration_samples", num_calibration_samples), ("max_seq_length", max_seq_length)):
        if value is not None and value < 1:
            raise SourceError(f"{option}: expected at least 1, got {value}")

    def read() -> CalibrationData:
        return _read(asked, assets, num_calibration_samples, max_seq_length)

    calibration = Calibration(read)
    if asked is not None:
        calibration.data  # noqa: B018  wrong data is an error now, not after the passes before the one that needs it
    return calibration


def _read(asked: Asked, assets: Assets, samples: int | None, length: int | None) -> CalibrationData:
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


def batches(calibration: Calibration, graph: Graph, tokens_at_once: int = 1024) -> GraphInputs:
    """The data as inputs of `graph`, in micro-batches of about `tokens_at_once` tokens.

    Raises:
        SourceError: if it is not what this graph takes.
    """
    data = calibration.data
    if data.tokens is not None:
        return GraphInputs(graph, [_language_model_batch(ids) for ids in _windows(graph, data, tokens_at_once)])
    if graph.interface.kind in ("causal_lm", "cached_lm"):
        return GraphInputs(graph, [_token_sample(sample, index, data.name) for index, sample in enumerate(data.samples)])
    return GraphInputs(graph, [_module_batch(graph, sample, f"{data.name} input {index}") for index, sample in enumerate(data.samples)])


def _windows(graph: Graph, data: CalibrationData, tokens_at_once: int) -> Sequence[Tensor]:
    ids = next((node for node in graph.placeholders if node.name == "input_ids"), None)
    if ids is None:
        names = ", ".join(node.name for node in graph.placeholders)
        raise SourceError(f"{data.name}: expected inputs {names} of the module, got tokens; pass calibration= an iterable of its inputs")
    assert data.tokens is not None
    batch, length = ids.meta["val"].shape
    tokens = data.tokens[:, :length] if isinstance(length, int) else data.tokens
    if isinstance(length, int) and tokens.shape[1] < length:
        raise SourceError(f"{data.name}: expected windows of {length} tokens, the length that was traced, got {tokens.shape[1]}")
    rows = batch if isinstance(batch, int) else max(1, tokens_at_once // tokens.shape[1])
    return [part for part in tokens.split(rows) if len(part) == rows or not isinstance(batch, int)]


def _language_model_batch(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)
    return {"input_ids": ids, "attention_mask": mask, "positions": places, "position_ids": places.clamp(min=0)}


def _token_sample(sample: Any, index: int, name: str) -> dict[str, Tensor]:
    if not isinstance(sample, Mapping) or "input_ids" not in sample or sample["input_ids"].dim() != 2:
        raise SourceError(f"{name} input {index}: expected a mapping with input_ids [B, S] and perhaps attention_mask [B, S]")
    return _language_model_batch(sample["input_ids"].long(), sample.get("attention_mask"))


def _module_batch(graph: Graph, sample: Any, where: str) -> dict[str, Tensor]:
    names = [node.name for node in graph.placeholders]
    if isinstance(sample, Mapping) and set(sample) == set(names):
        leaves = [sample[name] for name in names]
    else:
        arguments: Any = (
            ((sample,), {}) if isinstance(sample, Tensor) else ((), dict(sample)) if isinstance(sample, Mapping) else (sample, {})
        )
        leaves = _wrapped(lambda: flatten(graph.interface.inputs, arguments), where)
    _wrapped(lambda: graph.require_inputs(leaves), where)
    return dict(zip(names, leaves, strict=True))


def _wrapped(action: Callable[[], Any], where: str) -> Any:
    try:
        return action()
    except QCompileError as error:
        raise SourceError(f"{where}: {error}") from error


class GraphInputs:
    """Calibration batches as the placeholders of one graph: caches are empty, one page per sequence."""

    def __init__(self, graph: Graph, samples: Sequence[Sample]) -> None:
        """Check that every placeholder can be fed.

        Raises:
            SourceError: naming a placeholder for which the data holds nothing.
        """
        self._samples = samples
        self._values = {node.name: node.meta["val"] for node in graph.placeholders}
        self._is_lm = "attention_mask" in samples[0] and "input_ids" in samples[0] if samples else False
        self._check_vocabulary(graph)
        for name in self._values:
            if name not in samples[0] and not self._is_made(name):
                raise SourceError(f"calibration: expected a value for the input {name}, got {', '.join(samples[0])}; pass mappings with it")

    def __len__(self) -> int:
        return len(self._samples)

    def tensor(self, placeholder: str, batch: int) -> Tensor:
        """The placeholder's tensor in a batch; caches and page tables are made as they are asked for."""
        sample = self._samples[batch]
        if placeholder in sample:
            return sample[placeholder]
        rows, tokens = sample["input_ids"].shape
        if placeholder == "page_table":
            return torch.arange(rows, dtype=torch.int32).view(rows, 1)
        if placeholder == "token_type_ids":
            return torch.zeros(rows, tokens, dtype=torch.long)
        value = self._values[placeholder]
        sizes = iter((rows, tokens))  # a cache is [pages, heads, tokens of a page, size], the first and third symbolic
        shape = [size if isinstance(size, int) else next(sizes) for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype)

    def real(self, batch: int) -> Tensor | None:
        """Which tokens [B, S] are no padding; None where all are, and for inputs that are no text."""
        mask = self._samples[batch].get("attention_mask")
        return None if mask is None or mask.dim() != 2 or bool((mask != 0).all()) else mask != 0

    def _is_made(self, name: str) -> bool:
        value = self._values[name]
        cache = name.startswith(("keys_", "values_")) and sum(not isinstance(size, int) for size in value.shape) <= 2
        return self._is_lm and (name in ("page_table", "token_type_ids") or cache)

    def _check_vocabulary(self, graph: Graph) -> None:
        """Tokens beyond the embedding would be read from other memory, or fail without a name."""
        for node in graph.calls(torch.ops.aten.embedding.default):
            table, ids = node.args[0], node.args[1]
            if getattr(ids, "name", "") == "input_ids" and self._is_lm:
                size = int(table.meta["val"].shape[0])  # type: ignore[union-attr]
                worst = max(int(sample["input_ids"].max()) for sample in self._samples)
                if worst >= size:
                    raise SourceError(f"calibration: expected tokens below {size}, the model's vocabulary, got {worst}")
