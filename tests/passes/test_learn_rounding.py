"""rounding=learned: nearer to the float graph than where it starts, in the same format, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import SourceError
from qcompile.frontend import load
from qcompile.frontend.loaded import Loaded
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes import roundings
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import batches, make_calibration
from qcompile.passes.differentiable import Differentiable
from qcompile.passes.divergence import OutputError, TokenDivergence, divergence
from qcompile.passes.learn_rounding import Learning, learned
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.selection import find_heads
from qcompile.passes.work import WorkStore
from qcompile.quant.format import parse_format
from qcompile.quant.scheme import QuantScheme
from qcompile.target import parse_target, resolve
from tests.models import tiny
from tests.passes.helpers import Gated, capture

LONG = Learning(epochs=3, tokens_at_once=128, rate=1e-3, scale_rate=5e-4, held_out=8)


@pytest.fixture(autouse=True)
def _longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have little calibration data, so that they take more and larger steps."""
    monkeypatch.setitem(roundings.ROUNDINGS, "learned", learned(roundings.ROUNDINGS["gptq"], "learned", LONG))


def tokens(windows: int = 192) -> Tensor:
    """Random text [W, 16]."""
    return torch.randint(0, 100, (windows, 16), generator=torch.Generator().manual_seed(0))


def prepared(target: str, family: str = "llama") -> Loaded:
    """A tiny model, everything done that comes before weights are rounded."""
    torch.manual_seed(0)
    loaded = load(tiny(family))
    ctx = PassContext(parse_target(target), calibration=make_calibration(tokens(), loaded.assets))
    passes = default_pipeline(ctx.target, "best")
    run_pipeline(loaded.graph, passes[: [step.name for step in passes].index("quantize-weights")], ctx)
    return loaded


def rounded(loaded: Loaded, target: str, rounding: str, **options: Any) -> tuple[Graph, PassContext]:
    """A copy with its weights rounded."""
    graph = loaded.graph.clone()
    ctx = PassContext(parse_target(target), calibration=make_calibration(tokens(), loaded.assets), **options)
    run_pipeline(graph, [QuantizeWeights(rounding=rounding)], ctx)
    return graph, ctx


def distance(loaded: Loaded, graph: Graph) -> float:
    """Divergence from the float graph, on the text that was learned from."""
    judge = divergence(loaded.graph, find_heads(loaded.graph))
    assert isinstance(judge, TokenDivergence)
    inputs = batches(make_calibration(tokens(), loaded.assets), graph)
    exact = Differentiable(loaded.graph, judge.ends, [], inputs, exact=True)
    found = Differentiable(graph, judge.ends, [], inputs)
    results = [(found.results(found.forward(batch, {})), exact.results(exact.forward(batch, {}))) for batch in range(len(inputs))]
    return sum(judge(mine, theirs, None)[0] for mine, theirs in results) / len(inputs)


def packed(graph: Graph) -> dict[str, Tensor]:
    return {name: constant.materialize() for name, constant in graph.constants.items() if constant.format is not None}


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-w4a8-kv16", "cpu-w4a4-kv4"])
def test_learning_brings_a_language_model_nearer_to_float(target: str) -> None:
    loaded = prepared(target)
    start, better = (rounded(loaded, target, rounding)[0] for rounding in ("gptq", "learned"))
    assert distance(loaded, better) < 0.95 * distance(loaded, start)
    assert {name: (value.shape, value.dtype) for name, value in packed(better).items()} == {
        name: (value.shape, value.dtype) for name, value in packed(start).items()
    }


def test_learning_gives_the_same_bytes_every_time_and_is_taken_up_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = prepared("cpu-int4")
    first = packed(rounded(loaded, "cpu-int4", "learned")[0])
    stored = packed(rounded(loaded, "cpu-int4", "learned", work=WorkStore("", tmp_path))[0])
    monkeypatch.setattr("qcompile.passes.learn_rounding._Course", None)  # what is there is not learned again
    again = packed(rounded(loaded, "cpu-int4", "learned", work=WorkStore("", tmp_path))[0])
    assert first.keys() == stored.keys() == again.keys()
    assert all(torch.equal(first[name], stored[name]) and torch.equal(first[name], again[name]) for name in first)


def test_a_result_that_is_no_better_on_held_out_text_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = prepared("cpu-int4")
    wild = learned(roundings.ROUNDINGS["gptq"], "learned", Learning(tokens_at_once=128, rate=1.0, scale_rate=1.0, held_out=2))
    monkeypatch.setitem(roundings.ROUNDINGS, "learned", wild)
    graph, ctx = rounded(loaded, "cpu-int4", "learned")
    start = packed(rounded(loaded, "cpu-int4", "gptq")[0])
    assert all(torch.equal(value, start[name]) for name, value in packed(graph).items())
    assert ("quantize-weights", "learned", "learning did not help on the calibration data that was held out", True) in ctx.notes


def test_a_model_that_is_too_large_keeps_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = prepared("cpu-int4")
    bounded = learned(roundings.ROUNDINGS["gptq"], "learned", Learning(most_elements=1000))
    monkeypatch.setitem(roundings.ROUNDINGS, "learned", bounded)
    graph, ctx = rounded(loaded, "cpu-int4", "learned")
    start = packed(rounded(loaded, "cpu-int4", "gptq")[0])
    assert all(torch.equal(value, start[name]) for name, value in packed(graph).items())
    assert any("at most 1e+03 are learned" in reason and chosen for _, _, reason, chosen in ctx.notes)


def test_a_plain_module_is_judged_by_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roundings.ROUNDINGS, "learned", learned(roundings.ROUNDINGS["nearest"], "learned", LONG))
    torch.manual_seed(0)
    module = nn.Sequential(*(Gated() for _ in range(2)))
    mix = torch.randn(32, 32) * torch.linspace(2.0, 0.05, 32)
    samples = [torch.randn(64, 32) @ mix for _ in range(64)]
    graph = capture(module, samples[0])
    assert isinstance(divergence(graph, set()), OutputError)
    ctx = PassContext(
        resolve("cpu", QuantScheme("test", weight=parse_format("int3 g16 sym fp16"))), calibration=make_calibration(samples, Assets())
    )
    run_pipeline(graph, default_pipeline(parse_target("cpu-fp32"))[:4], ctx)
    errors = []
    for rounding in ("nearest", "learned"):
        result = graph.clone()
        run_pipeline(result, [QuantizeWeights(rounding=rounding)], ctx)
        errors.append(sum(float((result(sample) - graph(sample)).square().sum()) for sample in samples))
    assert errors[1] < 0.8 * errors[0]


def test_learning_needs_data_and_says_how_to_give_it() -> None:
    graph = prepared("cpu-int4").graph
    with pytest.raises(SourceError, match=r"quantize-weights\{rounding=learned\}: expected calibration data, got none; pass calibration="):
        run_pipeline(graph, [QuantizeWeights(rounding="learned")], PassContext(parse_target("cpu-int4")))
