"""Graph, verifier, printer."""

from __future__ import annotations

import operator

import pytest
import torch

from qcompile.errors import QCompileError, VerifyError
from qcompile.ir.graph import Graph
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from tests.golden import assert_golden
from tests.passes.helpers import Gated, capture, run

aten = torch.ops.aten


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Gated(), torch.randn(3, 32))


def test_it_runs_in_the_containers_of_the_model(graph: Graph) -> None:
    torch.manual_seed(0)
    module = Gated()
    x = torch.randn(5, 32)
    assert torch.equal(graph(x), module(x))
    with pytest.raises(QCompileError, match=r"input\[0\]: expected 1 values, got 2 values"):
        graph(x, x)


@pytest.mark.parametrize(
    ("shape", "dtype", "got"),
    [((4, 1), torch.float32, r"fp32\[4, 1\]"), ((4, 32), torch.float64, r"fp64\[4, 32\]"), ((4,), torch.float32, r"fp32\[4\]")],
)
def test_inputs_of_another_kind_are_refused_and_never_broadcast(graph: Graph, shape: tuple[int, ...], dtype: torch.dtype, got: str) -> None:
    with pytest.raises(QCompileError, match=rf"x: expected fp32\[.*, 32\], got {got}; compile again with example_inputs of that kind"):
        graph(torch.randn(shape, dtype=dtype))


def test_a_failing_operator_is_named_with_its_source_line(graph: Graph) -> None:
    with pytest.raises(QCompileError, match=r"\(helpers.py:\d+\): aten.mul.Tensor failed"):
        graph.run([torch.randn(4, 31)])


def test_a_clone_has_its_own_nodes_and_the_same_constants(graph: Graph) -> None:
    copy = graph.clone()
    assert copy.text() == graph.text()
    assert copy.fingerprint() == graph.fingerprint()
    run(copy, Canonicalize(), RaisePatterns())
    assert copy.fingerprint() != graph.fingerprint()
    assert copy.constants["down.weight"] is graph.constants["down.weight"]


def test_dead_nodes_and_their_constants_go(graph: Graph) -> None:
    (result,) = graph.output.args[0]  # type: ignore[misc]
    graph.insert(graph.output, aten.neg.default, (result,))
    extra = graph.add_constant("down.weight", torch.zeros(2))
    assert extra.target == "down.weight_1"
    assert graph.remove_dead() == 2
    assert "down.weight_1" not in graph.constants


def test_the_verifier_recomputes_values(graph: Graph) -> None:
    from qcompile.ir.verify import verify

    verify(graph, propagate=True)
    node = graph.calls(aten.linear.default)[0]
    node.meta["val"] = node.meta["val"].to(torch.float64)
    with pytest.raises(VerifyError, match=rf"{node.name} \(helpers.py:\d+\): expected the value torch.float32 .* got torch.float64"):
        verify(graph, propagate=True)


def test_an_operator_off_the_list_is_refused_with_the_remedy(graph: Graph) -> None:
    (result,) = graph.output.args[0]  # type: ignore[misc]
    node = graph.insert(graph.output, aten.digamma.default, (result,))
    graph.output.args = ((node,),)
    with pytest.raises(VerifyError, match=r"digamma.*: expected an operator of the allow-list, got aten.digamma; replace it, or add it to"):
        graph.verify()


def test_broken_order_constants_and_outputs_are_refused(graph: Graph) -> None:
    linear = graph.calls(aten.linear.default)[0]
    broken = graph.clone()
    late = broken.calls(aten.linear.default)[-1]
    early = next(node for node in broken.nodes if node.name == linear.name)
    early.args = (late, *early.args[1:])
    with pytest.raises(VerifyError, match=rf"{linear.name}.*: expected its argument {late.name} before it"):
        broken.verify()
    missing = graph.clone()
    del missing.constants["down.weight"]
    with pytest.raises(VerifyError, match=r"expected the constant 'down\.weight', got none of that name"):
        missing.verify()
    bare = graph.clone()
    bare.output.args = (bare.output.args[0][0],)  # type: ignore[index]
    with pytest.raises(VerifyError, match="output: expected a tuple of nodes"):
        bare.verify()


def test_symbolic_sizes_stay_symbolic(graph: Graph) -> None:
    assert {str(node.meta["val"].shape[0]) for node in graph.placeholders} == set(graph.interface.symbols)
    assert operator.getitem not in {node.target for node in graph.nodes}


def test_the_listing_is_the_golden_one(graph: Graph) -> None:
    run(graph, Canonicalize(), RaisePatterns(), QuantizeWeights(), FuseDequantize(), target="cpu-int4")
    assert_golden("listing.txt", graph.text())
