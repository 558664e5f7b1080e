"""Artifacts to load, to damage and to forge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qcompile
from qcompile.compiled import CompiledModel
from tests.models import tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has built nothing yet."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def compiled() -> CompiledModel:
    """A tiny llama with int4 weights."""
    return qcompile.compile(tiny("llama"), "cpu-int4", max_batch=3, max_context=64, engine="torch_cpu")


@pytest.fixture(scope="session")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, saved with an asset that is no ASCII; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "tiny"
    compiled.assets.files["chat_template.jinja"] = "{{ 'größer' }}\n".encode()
    compiled.save(path)
    return path


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def sm90(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledModel, Path]:
    """A tiny llama for sm90-int4, compiled in memory, and its artifact; no machine trusts its kernels."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.mktemp("builder")))
        model = qcompile.compile(tiny("llama"), "sm90-int4", max_batch=3, max_context=64)
        path = tmp_path_factory.mktemp("sm90") / "tiny"
        model.save(path)
    return model, path
