"""What flows along the edges of an ONNX graph: tensors, weights, and small tensors of numbers that are known while tracing.

Shapes are numbers: kept as Python integers and symbolic sizes, so that a dimension that varies still varies behind
`Shape -> Gather -> Concat -> Reshape`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.frontend.onnx.kinds import KINDS
from qcompile.frontend.onnx.weights import Weight

MOST_NUMBERS = 4096
"""A constant with more elements than this is never read as numbers."""


class RefusalError(Exception):
    """Raised by an operator's rule: expected what, got what; the interpreter adds which node of which file."""


class NeedsConstantError(RefusalError):
    """An input must be known while tracing and is computed at run time; `name` is its ONNX name."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"expected {what} ({name}) to be a constant or computed from shapes, got values known at run time only")
        self.name = name


class NotNumbersError(Exception):
    """Raised by a rule on numbers that wants to be tried on tensors instead."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """A small tensor whose elements are Python numbers or symbolic sizes: an object array, and the dtype it stands for."""

    array: np.ndarray[Any, np.dtype[np.object_]]
    dtype: torch.dtype

    @property
    def flat(self) -> list[Any]:
        """The elements in row-major order."""
        return list(self.array.reshape(-1))

    def tensor(self) -> Tensor:
        """The same as a tensor; symbolic elements become nodes of the trace."""
        if not any(is_symbolic(item) for item in self.flat):
            return torch.tensor(self.array.tolist(), dtype=self.dtype)
        if self.array.size == 1:
            return torch.full(self.array.shape, self.flat[0], dtype=self.dtype)
        return torch.stack([torch.full((), item, dtype=self.dtype) for item in self.flat]).reshape(self.array.shape)


@dataclass(frozen=True, eq=False)
class Held:
    """A weight or a constant: the tensor that is traced, and the handle on its bytes."""

    tensor: Tensor
    weight: Weight


Value = Tensor | Numbers | Held | list[Any] | None


def is_symbolic(item: Any) -> bool:
    """Whether a number is a size (or a comparison of sizes) that varies."""
    return isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool)


def objects(items: Iterable[Any], shape: Sequence[int]) -> np.ndarray[Any, np.dtype[np.object_]]:
    """An object array of `shape`; numpy never looks into the elements."""
    listed = list(items)
    array = np.empty(len(listed), dtype=object)
    for index, item in enumerate(listed):
        array[index] = item
    return array.reshape(tuple(shape))


def numbers_of(items: Iterable[Any], dtype: torch.dtype = torch.int64, shape: Sequence[int] | None = None) -> Numbers:
    """Numbers of one dimension, or of `shape`."""
    listed = list(items)
    return Numbers(objects(listed, [len(listed)] if shape is None else shape), dtype)


def rounded(item: Any, dtype: torch.dtype) -> Any:
    """A number as an element of `dtype`: float32 is written with the fewest digits that give it back (0.044715, not 0.0447149985)."""
    if is_symbolic(item):
        return item
    if dtype == torch.bool:
        return bool(item)
    if not dtype.is_floating_point:
        return int(item)
    value = float(item)
    if dtype != torch.float32 or not math.isfinite(value):
        return value
    with np.errstate(over="ignore"):
        short = float(str(np.float32(value)))
    # The largest float32 is rounded up by its fewest digits.
    return value if abs(short) > float(np.finfo(np.float32).max) else short


def known_numbers(weight: Weight) -> Numbers:
    """A small constant's elements."""
    dtype = KINDS[weight.kind]
    return numbers_of((rounded(item, dtype) for item in weight.elements()), dtype, weight.shape)
