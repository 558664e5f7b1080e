"""How fast this machine reads memory: the bound of decoding, measured beside it.

    python -m benchmarks.read_bandwidth [--bytes 1073741824] [--threads 1]

A C++ loop adds up the bytes as 64-bit integers, eight cache lines at a time, with and without asking for lines ahead; the best counts.
Each thread reads one piece, which it wrote.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import subprocess
import sys
from functools import cache

from qcompile.codegen.cpp.build import find_compiler, has_threads
from qcompile.kept import cache_directory

OUT_OF_CACHE = 1 << 30
SOURCE = r"""
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

typedef uint64_t Line __attribute__((vector_size(64)));

static uint64_t sum(const Line* from, int64_t lines, int64_t ahead) {
    Line sums[8] = {};
    int64_t line = 0;
    for (; line + 8 <= lines; line += 8) {
        if (ahead)
            for (int i = 0; i < 8; i++) __builtin_prefetch(from + line + i + ahead, 0, 3);
        for (int i = 0; i < 8; i++) sums[i] += from[line + i];
    }
    for (; line < lines; line++) sums[0] += from[line];
    uint64_t total = 0;
    for (int i = 0; i < 8; i++)
        for (int lane = 0; lane < 8; lane++) total += sums[i][lane];
    return total;
}

// Seconds of the fastest of `repeats` readings of `bytes` bytes by `threads` threads; negative where there is no such memory.
extern "C" double read_seconds(int64_t bytes, int threads, int repeats) {
    const int64_t lines = bytes / 64;
    Line* memory = static_cast<Line*>(std::aligned_alloc(1 << 21, (bytes + (1 << 21) - 1) >> 21 << 21));
    if (!memory) return -1.0;
#if defined(MADV_HUGEPAGE)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    double best = 1e30;
    volatile uint64_t kept = 0;
#pragma omp parallel num_threads(threads)
    {
#if defined(_OPENMP)
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int64_t thread = 0, all = 1;
#endif
        const int64_t first = lines * thread / all, last = lines * (thread + 1) / all;
        std::memset(memory + first, 1 + static_cast<int>(thread), (last - first) * 64);
        for (int repeat = 0; repeat < repeats; repeat++) {
#pragma omp barrier
            const auto started = std::chrono::steady_clock::now();
            const int64_t ahead[] = {0, 32, 64, 128};
            const uint64_t total = sum(memory + first, last - first, ahead[repeat % 4]);
#pragma omp atomic
            kept += total;
#pragma omp barrier
#pragma omp master
            {
                const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
                if (seconds < best) best = seconds;
            }
        }
    }
    std::free(memory);
    return best;
}
"""


@cache
def _library() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        sys.exit("benchmarks.read_bandwidth: expected a C++ compiler, got none; install g++, or name yours in $CXX")
    flags = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", *(["-fopenmp"] if has_threads(compiler) else [])]
    key = hashlib.sha256("\0".join([compiler, *flags, SOURCE]).encode()).hexdigest()[:16]
    path = cache_directory() / "benchmarks" / f"read-bandwidth-{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *flags, "-x", "c++", "-", "-o", str(path)], input=SOURCE, text=True, check=True)
    library = ctypes.CDLL(str(path))
    library.read_seconds.restype = ctypes.c_double
    library.read_seconds.argtypes = (ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    return library


def read_bandwidth(size: int = OUT_OF_CACHE, threads: int = 1, repeats: int = 0) -> float:
    """Bytes a second at which so many threads read `size` bytes again and again; the best of `repeats` (by default some 8 GiB)."""
    size = max(64 * 64, size // 64 * 64)
    seconds = float(_library().read_seconds(size, threads, repeats or max(8, min(1000, (8 << 30) // size))))
    if seconds <= 0:
        sys.exit(f"benchmarks.read_bandwidth: expected {size} bytes of memory, got none; measure fewer")
    return size / seconds


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=OUT_OF_CACHE)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(f"{read_bandwidth(options.bytes, options.threads) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
