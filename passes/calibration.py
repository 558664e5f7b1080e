"""Calibration data, and the tensors that a graph takes of it at that stage of its compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import QCompileError, SourceError
from qcompile.ir.graph import CACHE_STATES, Graph
from qcompile.ir.records import Assets, Calibrated
from qcompile.ir.structure import flatten
from qcompile.passes.calibration_data import Asked, CalibrationData, read_data

Sample = Mapping[str, Tensor]


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
    def known(self) -> CalibrationData | None:
        """The data if it has been read, else None."""
        return self._data

    @property
    def key(self) -> str:
        """What tells this data from other: a hash of its content."""
        return self.data.key

    @property
    def record(self) -> Calibrated | None:
        """What was read, in short; None where nothing was."""
        data = self.known
        if data is None:
            return None
        windows, length = (len(data.samples), 0) if data.tokens is None else data.tokens.shape
        return Calibrated(data.name, data.key, windows, length)

    def first(self, tokens: int) -> Calibration:
        """The windows that hold the first `tokens` tokens, at least one; inputs of a plain module are all kept."""
        return Calibration(lambda: self.data.first(tokens))


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
        return read_data(asked, assets, num_calibration_samples, max_seq_length)

    calibration = Calibration(read)
    if asked is not None:
        calibration.data  # noqa: B018  wrong data is an error now, not after the passes before the one that needs it
    return calibration


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
    parts = [tokens[start : start + rows] for start in range(0, len(tokens), rows)]
    return [part for part in parts if len(part) == rows or not isinstance(batch, int)]


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
        if placeholder == "slots":
            return torch.arange(rows, dtype=torch.int32)
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
        cache = name.startswith(CACHE_STATES) and sum(not isinstance(size, int) for size in value.shape) <= 2
        return self._is_lm and (name in ("page_table", "slots", "token_type_ids") or cache)

    def _check_vocabulary(self, graph: Graph) -> None:
        """Tokens beyond the embedding would be read from other memory, or fail without a name."""
        for node in graph.calls(torch.ops.aten.embedding.default):
            table, ids = node.args[0], node.args[1]
            if getattr(ids, "name", "") == "input_ids" and self._is_lm:
                size = int(table.meta["val"].shape[0])  # type: ignore[union-attr]
                worst = max(int(sample["input_ids"].max()) for sample in self._samples)
                if worst >= size:
                    raise SourceError(f"calibration: expected tokens below {size}, the model's vocabulary, got {worst}")
