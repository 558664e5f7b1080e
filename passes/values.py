"""Values of a graph over many batches, in memory up to a budget and in files beyond it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class _Spilled:
    """A tensor in a file of raw bytes. Plain files rather than mappings: mapped pages would count as memory of the process."""

    def __init__(self, tensor: Tensor, path: Path) -> None:
        self.path, self.shape, self.dtype = path, tensor.shape, tensor.dtype
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)

    def load(self) -> Tensor:
        return torch.from_numpy(np.fromfile(self.path, dtype=np.uint8)).view(self.dtype).reshape(self.shape)


class ValueStore:
    """Holds one value (a tensor, a number, or a tuple of them) per (name, batch) until it is dropped; a context manager."""

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        """Keep up to `budget` bytes of tensors in memory; the rest goes to a temporary folder in `directory`."""
        self._budget = budget
        self._directory = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._values: dict[tuple[str, int], Any] = {}
        self._files = 0
        self.resident = 0
        self.spilled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, name: str, batch: int, value: Any) -> None:
        """Keep `value`; tensors that no longer fit the budget are written to files."""
        self._values[name, batch] = pytree.tree_map_only(Tensor, self._keep, value)

    def has(self, name: str, batch: int) -> bool:
        """Whether there is such a value."""
        return (name, batch) in self._values

    def get(self, name: str, batch: int) -> Any:
        """The value, read from its file where it was written to one."""
        return pytree.tree_map_only(_Spilled, _Spilled.load, self._values[name, batch])

    def pop(self, name: str, batch: int) -> Any:
        """The value, which the store forgets."""
        value = self.get(name, batch)
        for leaf in pytree.tree_leaves(self._values.pop((name, batch))):
            if isinstance(leaf, _Spilled):
                leaf.path.unlink()
            elif isinstance(leaf, Tensor):
                self.resident -= leaf.nbytes
        return value

    def drop(self, name: str) -> None:
        """Forget the value of every batch."""
        for key in [key for key in self._values if key[0] == name]:
            self.pop(*key)

    def _keep(self, tensor: Tensor) -> Tensor | _Spilled:
        if self.resident + tensor.nbytes <= self._budget:
            self.resident += tensor.nbytes
            return tensor
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="values-", dir=self._directory)
        self._files += 1
        self.spilled += tensor.nbytes
        return _Spilled(tensor, Path(self._folder.name) / str(self._files))
