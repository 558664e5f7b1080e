"""The read bandwidth of this machine, by a loop in C++ that is compiled here: bytes per second of so many threads.

python -m benchmarks.read_bandwidth [--bytes 1073741824] [--threads 1]
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qcompile.codegen.cpp.build import find_compiler, no_compiler
from qcompile.runtime.huge_pages import huge_zeros

SOURCE = Path(__file__).with_suffix(".cpp")
LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL_CACHE = 32 << 20
OUT_OF_CACHE = 1 << 30
AHEAD = (0, 32, 64, 128)
"""Lines that are asked for ahead: some processors read faster so."""


def cache_bytes() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in LAST_LEVEL.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=USUAL_CACHE)


def large_pages(size: int) -> Tensor:
    """uint8 [size] in pages as large as the system gives, so that what is timed is memory and not its address tables."""
    return huge_zeros([([size], torch.uint8)])[0].fill_(1)


@cache
def read_loop() -> Callable[..., float]:
    """Seconds for reading a tensor once with so many threads, asking for so many lines ahead (by default none)."""
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit(f"benchmarks/read_bandwidth.py: {no_compiler()}")
    with tempfile.TemporaryDirectory(prefix="read-bandwidth-") as folder:
        library = Path(folder) / "read.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t), ctypes.c_uint64

    def seconds(memory: Tensor, threads: int, ahead: int = 0) -> float:
        started = time.perf_counter()
        function(memory.data_ptr(), memory.nbytes // 64, threads, ahead)
        return time.perf_counter() - started

    return seconds


def read_bandwidth(size: int = OUT_OF_CACHE, threads: int = 1, repeats: int = 0) -> float:
    """Bytes a second at which so many threads read `size` bytes again and again: the best of `repeats` (by default some 8 GiB)."""
    seconds, memory = read_loop(), large_pages(max(size, 1 << 16) // 64 * 64)
    count = repeats or max(2 * len(AHEAD), min(1000, (8 << 30) // memory.nbytes))
    return memory.nbytes / min(seconds(memory, threads, AHEAD[place % len(AHEAD)]) for place in range(count))


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=OUT_OF_CACHE)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(f"{read_bandwidth(options.bytes, options.threads) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
