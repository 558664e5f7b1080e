"""Hadamard rotations: exact on every family, absorbed by weights where they can be, and the end of outliers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qcompile.errors import PipelineError
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.instruments import outputs
from qcompile.passes.manager import run_pipeline
from qcompile.passes.moments import mean_moments, measure_moments, reader_groups
from qcompile.passes.rewrite_kv_cache import RewriteKvCache
from qcompile.passes.rotate_hadamard import RotateHadamard
from tests.golden import assert_golden
from tests.passes.basis_cases import after, calibrated, outlier_graph, rounding_error
from tests.passes.helpers import context, names
from tests.passes.space_cases import FAMILIES, canonical, family_graph

aten = torch.ops.aten
hadamard = torch.ops.qcompile.hadamard.default
EVERYWHERE = ("linears", "keys")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_whatever_is_rotated(family: str) -> None:
    """The stream of resnet is an output of convolutions with ReLU: nothing there admits a rotation but what its head reads."""
    _, changed = after(family, FoldNorms(), RotateHadamard(seed=3, online=EVERYWHERE))
    assert changed == (family != "resnet")


def test_without_online_places_weights_absorb_everything() -> None:
    graph, _ = after("llama", FoldNorms(), RotateHadamard())
    folded, _ = after("llama", FoldNorms())
    assert names(graph) == names(folded)
    changed = [name for name, constant in graph.constants.items() if "hadamard" in constant.key]
    assert len(changed) == 1 + 2 * 7 + 1  # embedding, seven linears per layer, head


def test_only_what_no_space_rotates_is_rotated_online() -> None:
    graph, _ = after("llama", FoldNorms(), RotateHadamard(online=("linears",)))
    found = graph.calls(hadamard)
    assert [str(node.args[0]) for node in found] == ["gated_activation", "gated_activation_1"]
    assert [[str(user.args[1]) for user in node.users] for node in found] == [
        [f"model_layers_{layer}_mlp_down_proj_weight"] for layer in (0, 1)
    ]
    # random signs of the hidden channels went into the up projection: nothing multiplies by them while the model runs
    assert "aten.mul.Tensor" not in names(graph)
    assert "signs(48" in graph.constants["model.layers.0.mlp.up_proj.weight"].key


def test_keys_are_rotated_after_positions_and_stored_so() -> None:
    graph, _ = after("llama", FoldNorms(), RotateHadamard(online=("keys",)), RewriteKvCache())
    stored = [node.args[2] for node in graph.calls(torch.ops.qcompile.cache_append.default)]
    assert [node.target for node in stored] == [hadamard] * 2
    assert [node.args[0].target for node in stored] == [torch.ops.qcompile.rope.default] * 2


def test_keys_without_positions_are_rotated_by_their_projections() -> None:
    graph, _ = after("gpt2", FoldNorms(), RotateHadamard(online=("keys",)))
    assert not graph.calls(hadamard)


def test_heads_can_be_left_alone() -> None:
    ctx = calibrated()
    graph, _ = after("llama", FoldNorms(), RotateHadamard(heads=False), ctx=ctx)
    assert "2 x hadamard(8" not in "".join(constant.key for constant in graph.constants.values())
    assert [reason for where, _, reason, _ in ctx.notes if where == "rotate-hadamard"].count("heads=false") == 2


def test_what_is_left_alone_is_noted_with_the_node_in_the_way() -> None:
    ctx = calibrated()
    after("llama", RotateHadamard(), ctx=ctx)
    reasons = {node: reason for where, node, reason, _ in ctx.notes if where == "rotate-hadamard"}
    assert reasons["space model.layers.0.mlp.down_proj.weight"] == (
        "gated_activation: a product of two branches is taken channel by channel"
    )
    assert reasons["space model.layers.0.mlp.gate_proj.weight"].startswith("rms_norm_1: its gain does not commute with rotations")


def test_seeds_give_other_rotations() -> None:
    first, second = (after("llama", FoldNorms(), RotateHadamard(seed=seed))[0] for seed in (0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(first.constants[name].materialize(), second.constants[name].materialize(), atol=1e-3)


def test_outliers_disappear() -> None:
    graph, ctx = outlier_graph()
    before = graph.clone()
    run_pipeline(graph, [RotateHadamard(online=("linears",))], ctx)
    old, new = measure_moments(before), measure_moments(graph)
    for reader in ("linear_1", "linear_3"):  # the stream, the hidden channels
        assert old[reader].peak > 6
        assert new[reader].peak < 2.5
        assert new[reader].kurtosis < old[reader].kurtosis / 10
    for number in (1, 3):
        assert rounding_error(graph, ctx, number) < rounding_error(before, ctx, number) / 4


def test_half_precision_keeps_the_rotation_orthogonal() -> None:
    graph, _ = after("llama", FoldNorms(), RotateHadamard(online=("linears",)))
    run_pipeline(graph, [ConvertDtype(to="bf16")], context())
    matrix = graph.constant(graph.calls(hadamard)[0].args[1])
    assert matrix is not None
    assert matrix.dtype == torch.float32


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(PipelineError, match="rotate-hadamard: option online: expected linears and keys, got 'heads'"):
        RotateHadamard(online=("linears", "heads")).run(family_graph("llama").clone(), context())


def test_the_listing_is_the_golden_one() -> None:
    graph, _ = after("llama", FoldNorms(), RotateHadamard(online=EVERYWHERE))
    assert_golden("rotated.txt", re.sub(r"(\w\.py):\d+", r"\1", graph.text()))  # line numbers of transformers move


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Graph:
    graph = canonical(load(smollm2_gguf).graph)
    run_pipeline(graph, [FoldNorms()], context())
    return graph


def test_a_real_model_loses_its_outliers_and_keeps_its_logits(smollm2: Graph) -> None:
    rotated = smollm2.clone()
    run_pipeline(rotated, [RotateHadamard(online=EVERYWHERE)], context())
    groups, old, new = reader_groups(smollm2), measure_moments(smollm2), measure_moments(rotated)
    hidden = [name for name, (size, _) in groups.items() if size == 1536]
    for space in ("embedding", "keys", *hidden):
        before, now = (mean_moments([found[reader] for reader in groups[space][1]]) for found in (old, new))
        assert now.peak < 3.6, space  # 576 Gaussian channels would have 3.2
        assert now.peak < before.peak / 2, space
        assert now.kurtosis < 3.2, space
    (expected, *_), (got, *_) = outputs(smollm2, wide=False), outputs(rotated, wide=False)
    assert (got - expected).abs().max() < 1e-3
