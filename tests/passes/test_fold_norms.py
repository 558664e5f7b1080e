"""fold-norms: gains and means leave the norms that stand in the way of a rotation, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from qcompile.ir.basis import Kind
from qcompile.ir.constants import Cast
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.spaces import find_spaces
from tests.passes.helpers import Gated, RmsNorm, assert_same_function, capture, context
from tests.passes.space_cases import EXACT, canonical, changed, family_graph, family_outputs

aten, qcompile = torch.ops.aten, torch.ops.qcompile
ROTATED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "mixtral", "qwen2_moe")
TIED = ("qwen2", "gpt2", "falcon")


def folded(graph: Graph, **options: bool) -> tuple[Graph, PassContext, bool]:
    """A clone after the pass, checked against the original."""
    clone, ctx = graph.clone(), context()
    done = FoldNorms(**options).run(clone, ctx)
    clone.verify()
    assert done == (clone.fingerprint() != graph.fingerprint())
    return clone, ctx, done


@pytest.mark.parametrize(("family", "untie"), [*((family, False) for family in ROTATED), *((family, True) for family in TIED)])
def test_the_stream_can_be_rotated_afterwards(family: str, untie: bool) -> None:
    graph = family_graph(family)
    clone, _, done = folded(graph, untie=untie)
    assert done
    assert relative_error(outputs(clone, wide=True), family_outputs(family)) <= EXACT
    assert 32 in {space.size for space in find_spaces(clone, Kind.ORTHOGONAL) if space.blocks == 1}
    for kind in (Kind.ORTHOGONAL, Kind.DIAGONAL):
        after, _ = changed(clone, kind, seed=5)
        assert relative_error(outputs(after, wide=True), family_outputs(family)) <= EXACT, kind
    assert not clone.calls(aten.layer_norm.default)
    assert not FoldNorms(untie=untie).run(clone, context()), "a second time there is nothing left to do"


@pytest.mark.parametrize(("family", "node", "reason"), [
    ("gemma2", "rms_norm_1", r"its gain cannot move into what reads it \(rms_norm: weighs its channels by their RMS"),
    ("gemma3", "rms_norm_3", r"its gain cannot move into what reads it \(rms_norm: weighs its channels by their RMS"),
    ("bert", "layer_norm_1", r"its operand cannot be centred \(linear: reads its mean"),
    ("vit", "layer_norm_4", r"its gain cannot move into what reads it \(layer_norm_4: is an output of the graph"),
])  # fmt: skip
def test_what_blocks_is_named_and_left_alone(family: str, node: str, reason: str) -> None:
    clone, ctx, done = folded(family_graph(family))
    assert not done
    assert clone.text() == family_graph(family).text()
    notes = {where: why for _, where, why, _ in ctx.notes}
    assert re.search(reason, notes[node])


def test_norms_of_queries_and_keys_stay() -> None:
    """They stand before positions, which block a rotation anyway: their gains are no obstacle."""
    clone, _, _ = folded(family_graph("qwen3"))
    gains = [node.args[1] is not None for node in clone.calls(qcompile.rms_norm.default)]
    assert gains.count(True) == 4
    assert gains.count(False) == 5


def test_a_tied_head_keeps_its_tie_by_a_small_linear() -> None:
    graph = family_graph("qwen2")
    clone, _, _ = folded(graph)
    assert len(clone.calls(aten.linear.default)) == len(graph.calls(aten.linear.default)) + 1
    head = clone.calls(aten.linear.default)[-1]
    assert head.args[1].target == clone.calls(aten.embedding.default)[0].args[0].target  # type: ignore[union-attr]
    (diagonal,) = (clone.constants[name] for name in clone.constants if name.endswith(".diagonal"))
    matrix = diagonal.materialize()
    torch.testing.assert_close(matrix, torch.diag(graph.constants["model.norm.weight"].materialize()))


def test_untying_shares_the_source() -> None:
    clone, _, _ = folded(family_graph("qwen2"), untie=True)
    table, head = (clone.constants[name] for name in ("model.embed_tokens.weight", "model.embed_tokens.weight.untied"))
    assert head.source is table.source
    assert not table.transforms
    assert len(head.transforms) == 1


def test_a_centred_stream_of_a_tied_model() -> None:
    """The table of gpt2 is also its head: it is centred by a linear behind the embedding, and the positions' table by itself."""
    clone, _, _ = folded(family_graph("gpt2"))
    assert not clone.constants["transformer.wte.weight"].transforms
    assert str(clone.constants["transformer.wpe.weight"].transforms[-1]) == "centred(axis=1)"
    assert "transformer.wte.weight.change_of_basis.centring" in clone.constants
    assert all(node.args[1] is None for node in clone.calls(qcompile.rms_norm.default))


def test_fused_add_and_norm() -> None:
    graph = family_graph("llama").clone()
    FuseResidualNorm().run(graph, context())
    assert graph.calls(qcompile.add_rms_norm.default)
    clone, _, done = folded(graph)
    assert done
    assert all(node.args[2] is None for node in clone.calls(qcompile.add_rms_norm.default))
    assert_same_function(graph, changed(clone, Kind.ORTHOGONAL)[0])


class Stack(nn.Module):
    """A stream between an input and an output projection, with gains offset by one as Gemma has them."""

    def __init__(self, *, post_norm: bool = False) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(6, 32), nn.Linear(32, 5)
        self.block = Gated()
        self.norm = RmsNorm(32, offset=True)
        self.post = RmsNorm(32) if post_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.inlet(x))
        x = x if self.post is None else x + self.post(x)
        result: Tensor = self.outlet(self.norm(x))
        return result


def test_an_offset_belongs_to_the_gain() -> None:
    graph = canonical(capture(Stack(), torch.randn(2, 5, 6)))
    clone, _, done = folded(graph)
    assert done
    assert_same_function(graph, clone)
    assert any("1 + " in str(item) for constant in clone.constants.values() for item in constant.transforms)
    assert all(node.args[1] is None and node.args[3] == 0.0 for node in clone.calls(qcompile.rms_norm.default))


def test_one_norm_in_the_way_keeps_all() -> None:
    """Rotating needs every norm of a stream: where one cannot be folded, the others would be folded for nothing."""
    graph = canonical(capture(Stack(post_norm=True), torch.randn(2, 5, 6)))
    _, ctx, done = folded(graph)
    assert not done
    assert [where for _, where, _, _ in ctx.notes] == ["rms_norm_1"]


def test_fuel_bounds_the_norms() -> None:
    graph = family_graph("llama").clone()
    ctx = context(fuel=2)
    assert FoldNorms().run(graph, ctx)
    assert [node.args[1] is None for node in graph.calls(qcompile.rms_norm.default)] == [True, True, False, False, False]
    assert relative_error(outputs(graph, wide=True), family_outputs("llama")) <= EXACT


def test_casts_stay_at_the_end_of_the_log() -> None:
    graph = family_graph("llama").clone()
    name = "model.layers.0.mlp.gate_proj.weight"
    graph.bind(name, graph.constants[name].then(Cast(torch.bfloat16)).then(Cast(torch.float32)))
    clone, _, _ = folded(graph)
    constant = clone.constants[name]
    assert constant.dtype == torch.float32
    assert str(constant.transforms[0]).startswith("times(axis=1"), "from the most precise values"
