"""K-sort: exact on every family, and blocks of like range."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import PipelineError, SourceError
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.manager import run_pipeline
from qcompile.passes.reorder_channels import ReorderChannels
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.passes.statistics import Request
from tests.passes.basis_cases import after, calibrated, outlier_graph, rounding_error
from tests.passes.helpers import context
from tests.passes.space_cases import FAMILIES, family_graph


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["absmax", "second-moment"])
def test_the_function_stays(family: str, by: str) -> None:
    assert after(family, ReorderChannels(by=by))[1]


@pytest.mark.parametrize("by", ["absmax", "second-moment"])
def test_blocks_hold_channels_of_like_range(by: str) -> None:
    graph, ctx = outlier_graph()
    before = graph.clone()
    run_pipeline(graph, [ReorderChannels(by=by)], ctx)
    for linear in (1, 3):
        assert rounding_error(graph, ctx, linear) < rounding_error(before, ctx, linear) / 2


def test_channels_fall_in_magnitude_within_each_head() -> None:
    ctx = calibrated()
    graph, _ = after("llama", ReorderChannels(), ctx=ctx)
    _, _, _, output, _, _, down, *_ = graph.calls(torch.ops.aten.linear.default)
    fall, heads = ctx.statistics(graph, [Request(str(node.args[0]), "absmax") for node in (down, output)]).values()
    assert bool((fall.diff() <= 0).all())
    shared = heads.view(2, 2, 8).amax(1)  # two query heads read each head of values
    assert bool((shared.diff(dim=-1) <= 0).all())


def test_a_permutation_behind_a_rotation_is_one_change_with_it() -> None:
    graph, _ = after("llama", FoldNorms(), RotateHadamard(), ReorderChannels())
    log = graph.constants["model.layers.0.mlp.down_proj.weight"].transforms
    assert sum("basis(axis=0" in str(entry) for entry in log) == 1


def test_a_second_run_finds_nothing_to_do() -> None:
    assert not after("llama", ReorderChannels(), ReorderChannels())[1]


def test_mistakes_are_named() -> None:
    with pytest.raises(PipelineError, match="reorder-channels: option by: expected absmax or second-moment, got 'mean'"):
        ReorderChannels(by="mean").run(family_graph("llama").clone(), calibrated())
    with pytest.raises(SourceError, match="expected calibration data, got none"):
        ReorderChannels().run(family_graph("llama").clone(), context())
