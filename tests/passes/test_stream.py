"""Streaming: every value as a whole run computes it, freed when it should be, in the order and only as far as asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile.errors import PassError, QCompileError
from qcompile.frontend import load
from qcompile.ir import ops
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes import execution, substitutes
from qcompile.passes.base import Pass
from qcompile.passes.calibration import Calibration, batches, make_calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.execution import Execution, Limits
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.manager import run_pipeline
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.passes.rewrite_kv_cache import RewriteKvCache
from qcompile.passes.stream import NodeInputs, real_rows, stream
from qcompile.passes.substitutes import has_bfloat16_units, narrow_linear
from qcompile.passes.work import WorkStore
from tests.models import VOCABULARY, tiny
from tests.passes.helpers import Gated, capture, context

aten = torch.ops.aten


@functools.cache
def _traced(family: str, cached: bool) -> Graph:
    graph = load(tiny(family)).graph
    steps: list[Pass] = [Canonicalize(), RaisePatterns(), FoldConstants(), RemoveDeadCode()]
    run_pipeline(graph, [*steps, RewriteKvCache()] if cached else steps, context())
    return graph


def language_model(family: str = "llama", *, cached: bool = False) -> Graph:
    """A canonical graph of a tiny model; with its cache, if asked."""
    return _traced(family, cached).clone()


def tokens(windows: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(5))


def calibration(data: Any = None) -> Calibration:
    return make_calibration(tokens() if data is None else data, Assets())


def linear_inputs(graph: Graph, data: Calibration, **options: Any) -> dict[str, Tensor]:
    """The input of every linear over all windows."""
    found: dict[str, Tensor] = {}

    def visit(node: fx.Node, inputs: NodeInputs) -> None:
        found[node.name] = torch.cat(list(inputs.rows()))

    stream(graph, data, visit, graph.calls(aten.linear.default), **options)
    return found


def whole_run(graph: Graph, ids: Tensor) -> dict[str, Tensor]:
    """The input of every linear, from running the reference on all windows at once."""
    program = graph.clone()
    linears = program.calls(aten.linear.default)
    program.output.args = (tuple(node.args[0] for node in linears),)
    feed = batches(calibration(ids), graph, tokens_at_once=ids.numel())
    results = program.run([feed.tensor(node.name, 0) for node in program.placeholders])
    return {node.name: value.reshape(-1, value.shape[-1]) for node, value in zip(linears, results, strict=True)}


@pytest.mark.parametrize(
    ("family", "cached"), [("llama", True), ("mistral", True), ("gemma2", False), ("gpt2", True), ("falcon", False), ("qwen2_moe", False)]
)
def test_inputs_are_those_of_a_whole_run(family: str, cached: bool) -> None:
    graph = language_model(family, cached=cached)
    expected = whole_run(graph, tokens())
    found = linear_inputs(graph, calibration(), tokens_at_once=24)
    assert list(found) == [node.name for node in graph.calls(aten.linear.default)]
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("limits", "spills"), [(Limits(values=0), True), (Limits(values=9000), True), (Limits(constants=1), False)])
def test_limits_do_not_change_a_bit(limits: Limits, spills: bool, tmp_path: Path) -> None:
    graph = language_model()
    limits = Limits(limits.values, limits.constants, tmp_path)
    plain, limited = linear_inputs(graph, calibration()), linear_inputs(graph, calibration(), limits=limits)
    assert all(torch.equal(plain[name], limited[name]) for name in plain)
    assert not list(tmp_path.iterdir())  # the folder of values is gone
    names = [[node.args[0].name] for node in graph.calls(aten.linear.default)]
    with Execution(graph, batches(calibration(), graph), names, limits=limits) as run:
        run.advance(3)
        assert bool(run._store.spilled) == spills
        assert bool(list(tmp_path.iterdir())) == spills


def test_bf16_graphs_run_in_float32() -> None:
    graph = language_model(cached=True)
    expected = linear_inputs(graph, calibration())
    run_pipeline(graph, [ConvertDtype(to="bf16")], context())
    found = linear_inputs(graph, calibration())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_replaced_weight_changes_what_follows_and_nothing_before() -> None:
    graph = language_model()
    linears = graph.calls(aten.linear.default)
    third = str(linears[2].args[1].target)  # type: ignore[union-attr]
    plain = linear_inputs(graph, calibration())
    found: dict[str, Tensor] = {}

    def visit(node: fx.Node, inputs: NodeInputs) -> Mapping[str, Constant] | None:
        found[node.name] = torch.cat(list(inputs.rows()))
        return {third: tensor_constant(2 * graph.constants[third].materialize())} if node is linears[2] else None

    stream(graph, calibration(), visit, linears)
    changed = graph.clone()
    changed.bind(third, tensor_constant(2 * graph.constants[third].materialize()))
    expected = linear_inputs(changed, calibration())
    same = [name for name in plain if torch.equal(found[name], plain[name])]
    assert same == [node.name for node in linears[:3]]
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_reference_runs_in_lockstep() -> None:
    graph = language_model()
    linears = graph.calls(aten.linear.default)
    plain = linear_inputs(graph, calibration())
    differs = []

    def visit(node: fx.Node, inputs: NodeInputs) -> Mapping[str, Tensor]:
        assert inputs.reference is not None
        beside = torch.cat(list(inputs.reference.rows()))
        assert torch.equal(beside, plain[node.name])
        differs.append(not torch.equal(beside, torch.cat(list(inputs.rows()))))
        name = str(node.args[1].target)  # type: ignore[union-attr]
        return {name: graph.constants[name].materialize().half().float()}

    stream(graph, calibration(), visit, linears, reference=graph.clone())
    assert differs[:3] == [False] * 3  # queries, keys and values read the embedding
    assert all(differs[3:])


def test_nothing_is_computed_that_no_visit_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = language_model()
    linears = graph.calls(aten.linear.default)
    called: list[str] = []
    original = execution.call
    monkeypatch.setattr(execution, "call", lambda node, *rest: (called.append(node.name), original(node, *rest))[1])
    stream(graph, calibration(), lambda node, inputs: None, linears)
    assert not called  # no visit asked for its inputs
    stream(graph, calibration(), lambda node, inputs: (len(list(inputs)), None)[1], linears[:4])
    assert linears[2].name in called
    assert linears[3].name not in called  # the last visited node itself is not run
    assert len(called) == len(set(called))  # one micro-batch: nothing twice


def test_values_are_freed_after_their_last_use() -> None:
    graph = language_model()
    linears = graph.calls(aten.linear.default)
    with Execution(graph, batches(calibration(), graph, 12), [[node.args[0].name] for node in linears]) as run:
        for stop in range(len(linears)):
            run.advance(stop)
            run.release(stop)
        assert not run._store._values
        assert run._store.resident == 0


def test_narrow_linears_are_near_and_small_ones_exact() -> None:
    x, large, small = torch.randn(40, 256), torch.randn(192, 256), torch.randn(100, 256)
    bias = torch.randn(192)
    exact = nn.functional.linear(x, large, bias)
    error = (narrow_linear(x, large, bias) - exact).abs().max()
    assert (error > 0) == has_bfloat16_units()
    assert error <= 2**-7 * exact.abs().max()
    assert torch.equal(narrow_linear(x, small), nn.functional.linear(x, small))


@pytest.mark.parametrize("window", [0, 4, 12])
@pytest.mark.parametrize("causal", [False, True])
def test_blocked_attention_is_the_reference(window: int, causal: bool) -> None:
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    padding = torch.ones(2, 12, dtype=torch.long)
    for last in (1, 0):
        padding[0, -1] = last
        found = substitutes.attention(q, k, v, padding, None, 0.3, causal, window)
        expected = ops.attention(q, k, v, padding, None, 0.3, causal, window)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("tokens", [12, 10, 3])
def test_attention_by_blocks_of_queries_is_the_reference(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substitutes, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(substitutes, "_QUERIES", 4)
    q, k, v = torch.randn(2, tokens, 4, 8).transpose(1, 2), torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 6)
    found = substitutes.attention(q, k, v, None, None, 0.3, causal=True)
    expected = ops.attention(q, k, v, None, None, 0.3, causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride()


def test_progress_reaches_its_total() -> None:
    graph = language_model()
    seen: list[tuple[int, int]] = []
    linear_inputs(graph, calibration(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_padding_is_left_out() -> None:
    graph = language_model()
    ids, mask = tokens(2), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    padded = linear_inputs(graph, calibration([{"input_ids": ids, "attention_mask": mask}]))
    first = linear_inputs(graph, calibration(ids[:1, 4:]))
    second = linear_inputs(graph, calibration(ids[1:]))
    for name, rows in padded.items():
        torch.testing.assert_close(rows, torch.cat((first[name], second[name])), rtol=1e-4, atol=1e-5)


def test_rows_of_every_layout() -> None:
    real = torch.tensor([[True, False, True], [True, True, False]])
    assert real_rows(torch.zeros(2, 3, 5), real).shape == (4, 5)
    assert real_rows(torch.zeros(2, 7, 3, 5), real).shape == (28, 5)
    assert real_rows(torch.zeros(6, 5), real).shape == (4, 5)
    assert real_rows(torch.zeros(4, 5), real).shape == (4, 5)


def test_plain_modules_stream_their_own_inputs() -> None:
    module = Gated().eval()
    graph = capture(module, torch.randn(2, 3, 32))
    run_pipeline(graph, [Canonicalize(), RaisePatterns(), FoldConstants(), RemoveDeadCode()], context())
    given = [torch.randn(2, 3, 32), torch.randn(5, 3, 32)]
    found = linear_inputs(graph, calibration(given))
    down = graph.calls(aten.linear.default)[-1]
    normed = [module.norm(x + x) for x in given]
    expected = torch.cat([(nn.functional.silu(module.gate(y)) * module.up(y)).reshape(-1, 48) for y in normed])
    torch.testing.assert_close(found[down.name], expected)


def test_a_node_of_another_graph_is_refused() -> None:
    graph = language_model()
    node = graph.clone().calls(aten.linear.default)[0]
    with pytest.raises(PassError, match="expected nodes of the graph, got linear of another one"):
        stream(graph, calibration(), lambda *_: None, [node])


def test_a_reference_without_the_node_is_refused() -> None:
    graph, reference = language_model(), language_model()
    reference.calls(aten.linear.default)[0].name = "other"
    with pytest.raises(PassError, match="nodes of the same names, got none for linear"):
        stream(graph, calibration(), lambda *_: None, graph.calls(aten.linear.default)[:1], reference=reference)


def test_an_operator_that_fails_is_named() -> None:
    graph = language_model()
    linears = graph.calls(aten.linear.default)
    name = str(linears[0].args[1].target)  # type: ignore[union-attr]

    def visit(node: fx.Node, inputs: NodeInputs) -> Mapping[str, Tensor] | None:
        inputs[0]
        return {name: torch.zeros(3, 5)} if node is linears[0] else None

    with pytest.raises(QCompileError, match=r"linear .*: aten.linear failed on calibration data"):
        stream(graph, calibration(), visit, linears)


@pytest.mark.parametrize("stop_at", [0, 5, 13])
def test_interrupted_rounding_continues_with_the_same_bytes(stop_at: int, tmp_path: Path) -> None:
    graph = language_model()
    linears = graph.calls(aten.linear.default)

    def rounding(store: WorkStore | None, fail_at: int = -1) -> tuple[dict[str, Tensor], list[str]]:
        """Each weight is rounded on a grid that depends on its input; returns the weights and which were computed."""
        made: dict[str, Tensor] = {}
        worked: list[str] = []

        def visit(node: fx.Node, inputs: NodeInputs) -> Mapping[str, Constant]:
            name = str(node.args[1].target)  # type: ignore[union-attr]
            done = store.get(name) if store is not None else None
            if done is None:
                if node is linears[fail_at] and fail_at >= 0:
                    raise KeyboardInterrupt
                worked.append(node.name)
                step = torch.cat(list(inputs.rows())).abs().mean()
                result = {"weight": (graph.constants[name].materialize() / step).round() * step}
                done = store.put(name, result) if store is not None else {"weight": tensor_constant(result["weight"])}
            made[name] = done["weight"].materialize()
            return {name: done["weight"]}

        ctx = context(calibration=calibration(), work=None)
        ctx.stream(graph, visit, linears, "rounding")
        return made, worked

    whole, all_visits = rounding(None)
    store = context(calibration=calibration(), work=WorkStore("t", tmp_path)).finished(graph, "rounding")
    with pytest.raises(KeyboardInterrupt):
        rounding(store, stop_at)
    resumed, visits = rounding(store)
    assert visits == all_visits[stop_at:]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert rounding(store)[1] == []
