"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qcompile.codegen.cpp import build
from qcompile.errors import SourceError
from qcompile.frontend.pinned import smollm2_path
from qcompile.runtime.native.processor import runs_here


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, downloaded once into the cache."""
    try:
        return smollm2_path()
    except SourceError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI tests the real model: {error}")
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quick_libraries() -> Iterator[None]:
    """What is compiled for a CPU is built for one instruction set, unoptimized, which changes no result; kernels' own tests name theirs."""
    chosen = build.chosen_sets
    best = next(name for name in build.instruction_sets() if runs_here(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "chosen_sets", lambda names: chosen([best] if names is None else names))
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
        yield
