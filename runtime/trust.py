"""Which native code may run: what was built on this machine, remembered by hash.

Hashes inside an artifact detect damage, not malice: whoever alters a cubin can alter its hash in the manifest as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from qcompile.kept import cache_directory


def trust(binaries: Iterable[bytes]) -> None:
    """Remember that these binaries were built on this machine."""
    directory = cache_directory() / "trusted"
    for binary in binaries:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / hashlib.sha256(binary).hexdigest()).touch()


def untrusted(binaries: Mapping[str, bytes]) -> tuple[str, ...]:
    """The names of binaries that this machine does not remember having built."""
    directory = cache_directory() / "trusted"
    return tuple(name for name, binary in sorted(binaries.items()) if not (directory / hashlib.sha256(binary).hexdigest()).is_file())
