"""From the source of an artifact to its shared libraries: the machine's own compiler, once per instruction set, cached by content."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from qcompile.codegen.build_cache import write_atomically
from qcompile.errors import KernelBuildError
from qcompile.ir.native import INSTRUCTION_SETS, library_name

COMPILERS = ("g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-w",
    # Nothing is fused but by `fma`, so that one row and many give the same bits; no library call sets errno, nothing traps.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
THREADS = "-fopenmp"
"""Left out where a compiler has no OpenMP: then every kernel runs on one thread."""
_X86: dict[str, tuple[str, ...]] = {
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}  # fmt: skip


def find_compiler() -> str | None:
    """$CXX, or g++ or clang++ on the path; None where there is neither."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next((path for name in COMPILERS if (path := shutil.which(name))), None)


@cache
def has_threads(compiler: str) -> bool:
    """Whether a compiler links OpenMP."""
    with tempfile.TemporaryDirectory(prefix="qcompile-native-") as folder:
        command = [compiler, THREADS, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(Path(folder) / "empty.so")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def no_compiler() -> str:
    """Why nothing can be built, with the remedy."""
    return f"there is no C++ compiler; install one of {', '.join(COMPILERS)}, or name yours in $CXX"


def instruction_sets() -> tuple[str, ...]:
    """Those that libraries can be built for on this machine, the best first."""
    return tuple(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)


def build_libraries(
    source: str, names: Sequence[str] | None = None, *, kept_in: Path | None = None, extra: Sequence[str] = ()
) -> dict[str, bytes]:
    """Compile the source of an artifact for several instruction sets.

    Args:
        source: what `library_source` made.
        names: of `INSTRUCTION_SETS`; by default all that this machine's compiler knows.
        kept_in: folder of earlier builds, or None to build anew.
        extra: further flags, after the usual ones.

    Returns:
        File name -> library.

    Raises:
        KernelBuildError: without a compiler, or with a source that does not compile, which is kept.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError(f"native kernels: expected a C++ compiler, got none: {no_compiler()}")
    chosen = tuple(names or instruction_sets())
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        built = list(pool.map(lambda name: _library(compiler, source, name, kept_in, tuple(extra)), chosen))
    return {library_name(platform.machine(), name): library for name, library in zip(chosen, built, strict=True)}


def _library(compiler: str, source: str, name: str, kept_in: Path | None, extra: tuple[str, ...]) -> bytes:
    """One library, from the cache if it is there."""
    flags = (*FLAGS, *_X86[name], *([THREADS] if has_threads(compiler) else []), *extra)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join((version, platform.machine(), *flags, source)).encode()).hexdigest()
    kept = None if kept_in is None else kept_in / f"{key}.so"
    if kept is not None and (found := _read(kept)) is not None:
        return found
    library = _compile(compiler, flags, source, name, key)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, library)
        write_atomically(kept.with_suffix(".sha256"), hashlib.sha256(library).hexdigest().encode())
    return library


def _read(kept: Path) -> bytes | None:
    """An earlier build, or None if there is none or its files do not belong together."""
    try:
        library = kept.read_bytes()
        return library if hashlib.sha256(library).hexdigest() == kept.with_suffix(".sha256").read_text() else None
    except OSError:
        return None


def _compile(compiler: str, flags: tuple[str, ...], source: str, name: str, key: str) -> bytes:
    folder = Path(tempfile.mkdtemp(prefix="qcompile-native-"))
    path, library = folder / "native.cpp", folder / "native.so"
    path.write_text(source, encoding="utf-8")
    done = subprocess.run([compiler, *flags, str(path), "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode:
        failed = folder.parent / f"qcompile-failed-{key[:16]}-{name}.cpp"
        path.replace(failed)
        shutil.rmtree(folder)
        first = "\n".join(line for line in done.stderr.replace(str(path), str(failed)).splitlines() if "error" in line)[:1500]
        raise KernelBuildError(
            f"native kernels ({name}): expected a source that {Path(compiler).name} compiles, got errors; this is a fault of qcompile: "
            f"report it with {failed}, compiled with {' '.join(flags)}\n{first}"
        )
    content = library.read_bytes()
    shutil.rmtree(folder)
    return content
