"""A libcuda made of C functions over host memory: it records every call and executes a few toy kernels."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.runtime.cuda.driver import Driver
from tests.runtime.cuda.stubbed import Stub


@pytest.fixture(scope="session")
def stub_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stub, compiled once."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to build the stub of libcuda")
    path = tmp_path_factory.mktemp("stub") / "libstub_cuda.so"
    source = Path(__file__).parent / "stub" / "stub_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def stub(stub_path: Path) -> Iterator[Stub]:
    """The stub with nothing recorded."""
    stub = Stub(stub_path)
    stub.reset()
    yield stub
    stub.reset()


@pytest.fixture
def driver(stub: Stub) -> Driver:
    """A driver over the stub."""
    return Driver(stub.path)
