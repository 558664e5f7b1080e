"""The tests of C++ kernels with what is emitted built under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.codegen.cpp.sanitized [arguments of pytest]

Both sanitizers must be in the process before anything else, so pytest runs in a process of its own that loads them first. There
every library is built with them, unoptimized, and the operands of a kernel lie in guarded memory (`guarded.py`). The first fault ends
the process with a report of the line in the emitted source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from qcompile.codegen.cpp import build
from qcompile.codegen.cpp.build import find_compiler
from qcompile.runtime.native import library

T = TypeVar("T")
VARIABLE = "QCOMPILE_SANITIZE"
ACTIVE = bool(os.environ.get(VARIABLE))
"""Whether this is such a process."""
PARTIAL = os.environ.get(VARIABLE) == "part"
"""Whether it builds only a part of the kernels: `test_a_part_of_the_grid` asks for that, and counts what ran."""
FLAGS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
"""The last one because AddressSanitizer looks for its functions when it starts."""
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
GRID = ("tests/codegen/cpp", "--ignore=tests/codegen/cpp/test_cpp_build.py")
"""What runs where no argument says otherwise: everything that calls a kernel."""
PART = 10
"""About how many kernels of a library are built where only a part of the grid is asked for."""
ROOT = Path(__file__).resolve().parents[3]
cases: Counter[Any] = Counter()
"""Calls of each case: a specification, an instruction set, the shapes of its operands."""


def runtimes() -> list[str]:
    """The libraries of the sanitizers, none where the compiler is not g++ or came without them."""
    compiler = find_compiler()
    if compiler is None:
        return []
    asked = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False) for name in RUNTIMES]
    found = [done.stdout.strip() for done in asked]
    return found if all(Path(path).is_file() and Path(path).is_absolute() for path in found) else []


def part_of(specs: Iterable[T]) -> list[T]:
    """What a library holds: all of its kernels, or a part if that was asked for; tests of the others are skipped when they call them."""
    distinct = list(dict.fromkeys(specs))
    return distinct[:: 1 + len(distinct) // PART] if PARTIAL else distinct


def sanitized(arguments: list[str], *, part: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process with the sanitizers, over a `part` of the kernels or all; the options are those of `subprocess.run`.

    Sources and libraries stand in a folder until the end, so that a report names lines; it stays where there is one.
    """
    folder = tempfile.mkdtemp(prefix="qcompile-sanitized-")
    environment = {**os.environ, **OPTIONS, VARIABLE: "part" if part else "all", "LD_PRELOAD": " ".join(runtimes()), "TMPDIR": folder}
    # What a process says as it ends has to come out at once: pytest must not catch the file of the errors.
    arguments = ["-p", "tests.codegen.cpp.sanitized", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=sys", "-q", *arguments]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, text=True, check=False, cwd=ROOT, **options)
    if done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        shutil.rmtree(folder)
    return done


def pytest_configure() -> None:
    """Build everything in this process with the sanitizers, and keep the files that reports name."""
    os.environ.pop("LD_PRELOAD", None)  # the compiler itself needs no watching
    build.FLAGS = (*build.FLAGS, *FLAGS)
    build.shutil = SimpleNamespace(which=shutil.which, rmtree=lambda path: None)
    library.tempfile = SimpleNamespace(TemporaryDirectory=lambda prefix: nullcontext(tempfile.mkdtemp(prefix=prefix)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how much was run."""
    kernels = {(spec, name) for spec, name, _ in cases}
    terminalreporter.write_line(
        f"sanitized: {len(kernels)} kernels (specification and instruction set) in {len(cases)} cases (and shapes), {cases.total()} calls"
    )


def main() -> None:
    """Run the grid, or what the command line says."""
    if not runtimes():
        sys.exit("tests.codegen.cpp.sanitized: expected g++ with libasan and libubsan, got none; install it, or name it in $CXX")
    sys.exit(sanitized(sys.argv[1:] or list(GRID)).returncode)


if __name__ == "__main__":
    main()
