"""Loading makes many objects that last, and none that a collector could free."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Put the collector of cycles off: in the midst of loading it would walk all of torch's objects, a tenth of a second for nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
