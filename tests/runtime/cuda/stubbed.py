"""The stub of libcuda as tests see it: what was called, and which call is to fail."""

from __future__ import annotations

import ctypes
from pathlib import Path


class Call(ctypes.Structure):
    """One recorded call, as the stub lays it out."""

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("detail", ctypes.c_char * 192),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("buffer", ctypes.c_uint8 * 512),
        ("size", ctypes.c_size_t),
    )

    @property
    def packed(self) -> bytes:
        """The parameter buffer of a launch."""
        return bytes(self.buffer[: self.size])


class Stub:
    """The stub's own entry points: what was called, and which call is to fail."""

    def __init__(self, path: Path) -> None:
        """Load the library that drivers under test load too."""
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_call.restype = ctypes.POINTER(Call)

    def reset(self) -> None:
        """Forget calls and failures."""
        self._library.stub_reset()

    def fail(self, name: str, code: int, nth: int = 1) -> None:
        """Let the nth call of an entry point from now on return `code`."""
        self._library.stub_fail(name.encode(), nth, code)

    def limit_shared(self, size: int) -> None:
        """Be a device with that much shared memory per program."""
        self._library.stub_set_shared_limit(size)

    def calls(self, *names: str) -> list[Call]:
        """The recorded calls of these entry points in order, of all if none is named."""
        found = [self._library.stub_call(index).contents for index in range(self._library.stub_count())]
        return [call for call in found if not names or call.name.decode() in names]

    def launched(self) -> list[str]:
        """The symbols given to cuLaunchKernel, in order."""
        return [call.detail.decode() for call in self.calls("cuLaunchKernel")]
