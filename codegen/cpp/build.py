"""From the source of an artifact to its shared libraries: the machine's own compiler, once per instruction set, cached by content."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from qcompile.codegen.build_cache import failed_sources, write_atomically
from qcompile.errors import KernelBuildError, OptionError
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
def takes(compiler: str, *flags: str) -> bool:
    """Whether a compiler makes a library with these flags."""
    with tempfile.TemporaryDirectory(prefix="qcompile-native-") as folder:
        command = [compiler, *flags, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(Path(folder) / "empty.so")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def has_threads(compiler: str) -> bool:
    """Whether a compiler links OpenMP."""
    return takes(compiler, THREADS)


def no_compiler() -> str:
    """Why nothing can be built, with the remedy."""
    named = os.environ.get("CXX")
    where = f" ($CXX is {named!r}, which is no program here)" if named else ""
    return (
        f"there is no C++ compiler{where}; install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
        "xcode-select --install) or clang++, or name yours in $CXX"
    )


def instruction_sets() -> tuple[str, ...]:
    """Those that libraries can be built for on this machine, the best first: older compilers do not know them all."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ("portable",)
    compiler = find_compiler()
    return tuple(name for name in INSTRUCTION_SETS if compiler is None or takes(compiler, *_X86[name]))


def chosen_sets(names: Sequence[str] | None) -> tuple[str, ...]:
    """What libraries are built for: `names`, or all that can be.

    Raises:
        OptionError: for one that cannot be built here, or none at all.
    """
    known = instruction_sets()
    wrong = next((name for name in names or () if name not in known), None)
    if wrong is not None or (names is not None and not names):
        raise OptionError(
            f"instruction_sets: expected some of {', '.join(known)}, which the C++ compiler of this machine builds, got {wrong or 'none'}; "
            "leave it out for all of them"
        )
    return known if names is None else tuple(dict.fromkeys(names))


def build_libraries(
    source: str, names: Sequence[str] | None = None, *, kept_in: Path | None = None, extra: Sequence[str] = (),
    failed_in: Path | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Compile the source of an artifact for several instruction sets.

    Args:
        source: what `library_source` made.
        names: of `INSTRUCTION_SETS`; by default all that this machine's compiler knows.
        kept_in: folder of earlier builds, or None to build anew.
        extra: further flags, after the usual ones.
        failed_in: folder for a source that does not compile; by default `QCOMPILE_CACHE`/failed.

    Returns:
        File name -> library.

    Raises:
        KernelBuildError: without a compiler, or with a source that does not compile, which is kept.
        OptionError: for an instruction set that this machine's compiler does not know.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError(f"native kernels: expected a C++ compiler, got none: {no_compiler()}")
    chosen = chosen_sets(names)
    failed = failed_in or failed_sources()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        built = list(pool.map(lambda name: _library(compiler, source, name, kept_in, tuple(extra), failed), chosen))
    return {library_name(platform.machine(), name): library for name, library in zip(chosen, built, strict=True)}


def _library(compiler: str, source: str, name: str, kept_in: Path | None, extra: tuple[str, ...], failed_in: Path) -> bytes:
    """One library, from the cache if it is there."""
    flags = (*FLAGS, *_X86[name], *([THREADS] if has_threads(compiler) else []), *extra)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join((version, platform.machine(), *flags, source)).encode()).hexdigest()
    kept = None if kept_in is None else kept_in / f"{key}.so"
    if kept is not None and (found := _read(kept)) is not None:
        return found
    library = _compile([compiler, *flags], source, failed_in / f"native-{name}-{key[:16]}.cpp")
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


def _compile(command: Sequence[str], source: str, failed: Path) -> bytes:
    """What the compiler makes of a source; one that it refuses is kept as `failed`, with all that the compiler said beside it."""
    with tempfile.TemporaryDirectory(prefix="qcompile-native-") as folder:
        path, library = Path(folder) / "native.cpp", Path(folder) / "native.so"
        path.write_text(source, encoding="utf-8")
        done = subprocess.run([*command, str(path), "-o", str(library)], capture_output=True, text=True, check=False)
        if not done.returncode:
            return library.read_bytes()
    said = done.stderr.replace(str(path), str(failed))
    ran = shlex.join([*command, str(failed), "-o", "native.so"])
    failed.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(failed, source.encode())
    write_atomically(failed.with_suffix(".log"), f"{ran}\n{said}".encode())
    first = "\n".join([line for line in said.splitlines() if "error" in line] or said.splitlines())[:1500]
    raise KernelBuildError(
        f"native kernels: expected a source that {Path(command[0]).name} compiles, got errors; unless it ran out of memory or disk this is "
        f"a fault of qcompile: report it to whoever you have qcompile from, with {failed} and the .log beside it, and compile with "
        f"engine='torch_cpu' until then. What was run, and what it said first:\n{ran}\n{first}"
    )
