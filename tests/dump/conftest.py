"""Dumps for the tests that only read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.pipelines import default_pipeline, insert
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.target import parse_target
from tests.models import tiny

TARGET = "cpu-w4a8"


def outlier_llama() -> nn.Module:
    """A tiny llama with one loud channel in its residual stream."""
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[:, 5] *= 20
    return model


@pytest.fixture(scope="session")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of a llama that was rotated, and rounded to nearest."""
    path = tmp_path_factory.mktemp("dump") / "d"
    pipeline = insert(default_pipeline(parse_target(TARGET)), FoldNorms(), before="rewrite-kv-cache")
    pipeline = insert(pipeline, RotateHadamard(), before="rewrite-kv-cache")
    qcompile.compile(outlier_llama(), TARGET, passes=pipeline, dump=path, max_context=8, group_size=16, engine="torch_cpu")
    return path


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of a tiny llama, checked while it was compiled, and the folder `artifact` beside it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("report")
    compiled = qcompile.compile(
        tiny("llama"), "cpu-int4", recipe="nearest", max_context=32, check=True, dump=root / "dump", engine="torch_cpu"
    )
    compiled.save(root / "artifact")
    return root / "dump"
