"""A shared library of an artifact, loaded from memory."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

from qcompile.errors import EngineError

Entry = Callable[[int, int], None]
"""A run of steps: the address of its table of tensors, and how many threads make it."""
PACKING_WORDS = 7
"""Integers of 64 bits of a `Packing`: where from and where to, rows, bytes of a row and of a word, mask and bits."""


class Library:
    """Functions over tables of tensors. It stays loaded as long as the process lives: nothing unloads code that may run."""

    def __init__(self, name: str, content: bytes) -> None:
        """Load the library called `name`, which the artifact's loader has let through.

        Raises:
            EngineError: if this system cannot load it.
        """
        self.name = name
        with tempfile.TemporaryDirectory(prefix="qcompile-native-") as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            try:
                self._library = ctypes.CDLL(str(path))
            except OSError as error:
                raise EngineError(
                    f"{name}: expected a library that this system loads, got {error}; load with engine='torch_cpu'"
                ) from error

    @property
    def plan(self) -> str:
        """The digest of the plan that it was made for (`qcompile.ir.native.plan_digest`); "" if it does not say."""
        function = getattr(self._library, "qcompile_plan", None)
        if function is None:
            return ""
        function.restype = ctypes.c_char_p
        return str(function().decode())

    def pack(self, weights: Tensor, threads: int) -> None:
        """Make the layouts of weights: int64 [n, 7], each as `Packing` of `codegen/cpp/layouts.h` has it; all memory is the caller's."""
        function = self._library.qcompile_pack
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None
        function(weights.data_ptr(), len(weights), threads)

    def entry(self, name: str) -> Entry:
        """The function called `name`."""
        function = getattr(self._library, name)
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), None
        found: Entry = function
        return found


@cache
def loaded(name: str, content: bytes) -> Library:
    """The library of this content, loaded once a process."""
    return Library(name, content)
