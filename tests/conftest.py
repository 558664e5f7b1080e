"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qcompile.errors import SourceError
from qcompile.frontend.pinned import smollm2_path


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
