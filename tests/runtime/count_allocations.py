"""Decode steps of an artifact in a process that loads `allocations.c` first: prints what each kind of step allocates, as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import qcompile

STEPS = 32


def allocated(counter: Any, what: Callable[[], object]) -> list[int]:
    """Calls and bytes of the C library's allocator in `STEPS` steps, and blocks of Python's that were not there before."""
    before = [counter.allocation_calls(), counter.allocation_bytes(), sys.getallocatedblocks()]
    for _ in range(STEPS):
        what()
    after = [counter.allocation_calls(), counter.allocation_bytes(), sys.getallocatedblocks()]
    return [late - early for early, late in zip(before, after, strict=True)]


def main() -> None:
    """Steps of one and of two threads, after as many to get warm."""
    counter = ctypes.CDLL(None)
    engine: Any = qcompile.load(sys.argv[1], max_context=512, engine="native").engine
    out = torch.empty_like(engine.prefill([[5, 6, 7]]))
    engine.decode([5])
    program = engine._program("decode", 1, 1)
    steps = {"native": program.run, "decode": lambda: engine.decode([5], out=out), "new logits": lambda: engine.decode([5])}
    found = {}
    gc.disable()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, step in steps.items():
            allocated(counter, step)
            found[f"{name}, {threads} threads"] = allocated(counter, step)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
