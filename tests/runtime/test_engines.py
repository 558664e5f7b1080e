"""The CPU engines: what they compute is what the graph says, whatever the batch, the pages and the chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import CapacityError, EngineError
from qcompile.ir.lowered import Plan
from qcompile.ir.memory import with_batch
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.engines.reference import ReferenceEngine
from qcompile.runtime.engines.torch_cpu import TorchCpuEngine
from tests.models import tiny
from tests.passes.helpers import Gated

# Windows of mistral and gemma2 are 5 tokens: one prompt is shorter.
PROMPTS = [[3, 14, 15, 92, 65, 35], [89, 79, 32], [38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19]]
FAMILIES = ("llama", "mistral", "gemma2")
ENGINES: tuple[type[PlanEngine], ...] = (ReferenceEngine, TorchCpuEngine)
CONTEXT = 24
TOLERANCE = 1e-5


class PagedReference(ReferenceEngine):
    """Pages of four tokens in place of one page per sequence."""

    def __init__(self, contents: ArtifactContents, **sizes: Any) -> None:
        super().__init__(contents, page_tokens=4, **sizes)


class PagedTorchCpu(TorchCpuEngine):
    """The same."""

    def __init__(self, contents: ArtifactContents, **sizes: Any) -> None:
        super().__init__(contents, page_tokens=4, **sizes)


@pytest.fixture(scope="module", params=FAMILIES)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    """A tiny model for three sequences; every engine can run it."""
    return qcompile.compile(tiny(request.param), "cpu-int4", max_batch=3, max_context=CONTEXT)


def engine_of(kind: type[PlanEngine], compiled: CompiledModel, plan: Plan | None = None) -> PlanEngine:
    """An engine over the model's contents, with a plan of its own if given."""
    made = compiled.contents
    contents = ArtifactContents(made.graph, plan or made.plan, made.kernels, made.binaries, made.assets, made.target, made.pipeline)
    return kind(contents, max_batch=3, max_context=CONTEXT)


def chunked(plan: Plan, tokens: int) -> Plan:
    """The plan with prompts in chunks of `tokens`."""
    prefill = plan.entries["prefill"]
    return with_batch(Plan(plan.entries | {"prefill": replace(prefill, limits=prefill.limits | {"sequence": tokens})}, plan.kernels), 3)


def by_graph(compiled: CompiledModel, sequence: Sequence[int]) -> Tensor:
    """Logits [S, V] of one sequence, from the graph run node by node over an empty cache."""
    size = len(sequence)
    given: dict[str, Any] = {
        "input_ids": torch.tensor([sequence]),
        "positions": torch.arange(size).unsqueeze(0),
        "page_table": torch.zeros(1, 1, dtype=torch.int32),
    }
    nodes = compiled.graph.placeholders
    for node in nodes:
        if node.name not in given:
            value = node.meta["val"]
            given[node.name] = torch.zeros(1, int(value.shape[1]), size, int(value.shape[3]), dtype=value.dtype)
    logits: Tensor = compiled.graph.run([given[node.name] for node in nodes])[0]
    return logits[0]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def run(engine: PlanEngine, prompts: Sequence[Sequence[int]], steps: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits [B, V] after the prompts and after each step's tokens."""
    return [engine.prefill(prompts), *(engine.decode(tokens) for tokens in steps)]


STEPS = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]


@pytest.mark.parametrize("kind", [*ENGINES, PagedReference, PagedTorchCpu])
def test_ragged_batches_give_what_the_graph_gives(kind: type[PlanEngine], compiled: CompiledModel) -> None:
    got = run(engine_of(kind, compiled), PROMPTS, STEPS)
    for row, prompt in enumerate(PROMPTS):
        whole = by_graph(compiled, [*prompt, *(step[row] for step in STEPS)])
        assert_close(torch.stack([logits[row] for logits in got]), whole[len(prompt) - 1 :])


@pytest.mark.parametrize("kind", ENGINES)
def test_a_plain_forward_pass_takes_padding_anywhere(kind: type[PlanEngine], compiled: CompiledModel) -> None:
    ids = torch.tensor([[0, 0, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 0, 0, 0, 0], [3, 0, 4, 0, 5, 6, 0, 0]])
    positions = (ids != 0).long().cumsum(-1) - 1
    (logits,) = engine_of(kind, compiled).forward({"input_ids": ids, "positions": positions.masked_fill(ids == 0, -1)})
    assert bool(torch.isfinite(logits).all())
    for row in range(3):
        real = ids[row] != 0
        assert_close(logits[row, real], by_graph(compiled, ids[row, real].tolist()))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_prompts_in_chunks_give_what_one_chunk_gives(kind: type[PlanEngine], size: int, compiled: CompiledModel) -> None:
    whole = run(engine_of(kind, compiled), PROMPTS, STEPS[:1])
    parts = run(engine_of(kind, compiled, chunked(compiled.contents.plan, size)), PROMPTS, STEPS[:1])
    for got, expected in zip(parts, whole, strict=True):
        assert_close(got, expected)


def test_chunks_over_pages_are_exact_in_the_reference(compiled: CompiledModel) -> None:
    whole = run(engine_of(ReferenceEngine, compiled), PROMPTS, STEPS)
    parts = run(engine_of(PagedReference, compiled, chunked(compiled.contents.plan, 3)), PROMPTS, STEPS)
    for got, expected in zip(parts, whole, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("kind", [*ENGINES, PagedTorchCpu])
def test_a_finished_row_stores_nothing_and_leaves_the_others_alone(kind: type[PlanEngine], compiled: CompiledModel) -> None:
    engine = engine_of(kind, compiled)
    engine.prefill(PROMPTS)
    engine.decode([5, 6, 7])
    engine.decode([8, -1, 10])
    assert engine.state == [8, 4, 13]
    after = engine.decode([11, -1, -1])
    assert engine.state == [9, 4, 13]
    assert_close(after[0], by_graph(compiled, [*PROMPTS[0], 5, 8, 11])[-1])
    # A row may rest and go on.
    assert_close(engine.decode([-1, 9, -1])[1], by_graph(compiled, [*PROMPTS[1], 6, 9])[-1])
    assert bool(torch.isfinite(engine.decode([-1, -1, -1])).all())
    assert engine.state == [9, 5, 13]


def test_rows_of_the_reference_do_not_depend_on_their_batch(compiled: CompiledModel) -> None:
    prompt, others = PROMPTS[0], PROMPTS[1:]
    engine = engine_of(ReferenceEngine, compiled)
    alone = torch.stack([logits[0] for logits in run(engine, [prompt], [[5], [8]])])
    for row in range(3):
        batch = [*others[:row], prompt, *others[row:]]
        steps = [[6, 7], [9, 10]]
        fed = [[*step[:row], token, *step[row:]] for step, token in zip(steps, (5, 8), strict=True)]
        together = torch.stack([logits[row] for logits in run(engine, batch, fed)])
        assert torch.equal(together, alone), row


@pytest.mark.parametrize("kind", ENGINES)
def test_a_new_batch_knows_nothing_of_the_last(kind: type[PlanEngine], compiled: CompiledModel) -> None:
    engine = engine_of(kind, compiled)
    run(engine, [PROMPTS[2], PROMPTS[2]], [[5, 6]])
    again = run(engine, PROMPTS[:2], [[7, 8]])
    fresh = run(engine_of(kind, compiled), PROMPTS[:2], [[7, 8]])
    assert all(torch.equal(got, expected) for got, expected in zip(again, fresh, strict=True))
    assert engine.state == [7, 4]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_forward_pass_in_between_leaves_the_sequences_alone(kind: type[PlanEngine], compiled: CompiledModel) -> None:
    engine = engine_of(kind, compiled)
    engine.prefill(PROMPTS)
    engine.forward({"input_ids": torch.tensor([[1, 2, 3, 4]])})
    expected = run(engine_of(kind, compiled), PROMPTS, STEPS[:1])[1]
    assert torch.equal(engine.decode(STEPS[0]), expected)


@pytest.mark.parametrize("kind", ENGINES)
def test_logits_stay_as_they_are_when_the_engine_goes_on(kind: type[PlanEngine], compiled: CompiledModel) -> None:
    engine = engine_of(kind, compiled)
    first = engine.prefill(PROMPTS)
    second = engine.decode([5, 6, 7])
    kept = first.clone(), second.clone()
    engine.decode([8, 9, 10])
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])


def test_prompts_of_many_lengths_reuse_few_programs(compiled: CompiledModel) -> None:
    engine = engine_of(TorchCpuEngine, compiled)
    for size in range(1, 20):
        engine.prefill([list(range(3, 3 + size))])
        engine.decode([5])
        assert len(engine._programs) <= 8
    assert_close(engine.decode([6])[0], by_graph(compiled, [*range(3, 22), 5, 6])[-1])


@pytest.fixture(scope="module")
def llama() -> CompiledModel:
    return qcompile.compile(tiny("llama"), "cpu-int4", max_batch=1, max_context=CONTEXT)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_plan_for_fewer_sequences_is_laid_out_anew(kind: type[PlanEngine], llama: CompiledModel) -> None:
    assert llama.contents.plan.entries["decode"].limits["batch"] == 1
    got = run(engine_of(kind, llama), PROMPTS, STEPS[:1])
    for row, prompt in enumerate(PROMPTS):
        assert_close(torch.stack([got[0][row], got[1][row]]), by_graph(llama, [*prompt, STEPS[0][row]])[-2:])


@pytest.mark.parametrize("kind", ENGINES)
def test_mistakes_are_named_before_anything_is_computed(kind: type[PlanEngine], llama: CompiledModel) -> None:
    engine = engine_of(kind, llama)
    with pytest.raises(EngineError, match=r"decode: expected a token for each of the 0 sequences of the batch, got 1"):
        engine.decode([5])
    with pytest.raises(CapacityError, match=r"prefill: expected at most 3 sequences, got 4; load with max_batch=4"):
        engine.prefill([[5]] * 4)
    with pytest.raises(
        CapacityError, match=r"sequence 1: expected at most 24 tokens, the capacity of the cache, got 25; load with max_context=25"
    ):
        engine.prefill([[5], [5] * 25])
    for prompts in ([], [[5], []]):
        with pytest.raises(EngineError, match=r"prefill: expected at least one token in each sequence, got \["):
            engine.prefill(prompts)
    engine.prefill([[5], [5] * 24])
    for tokens in ([], [5], [5, 5, 5]):
        with pytest.raises(EngineError, match=rf"decode: expected a token for each of the 2 sequences of the batch, got {len(tokens)}"):
            engine.decode(tokens)
    with pytest.raises(CapacityError, match=r"sequence 1: expected at most 24 tokens, .* got 1 after 24 held; load with max_context=25"):
        engine.decode([5, 5])
    assert engine.state == [1, 24]
    engine.decode([5, -1])
    assert engine.state == [2, 24]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("token", [100, 1 << 40])
def test_tokens_outside_the_vocabulary_are_refused(kind: type[PlanEngine], token: int, llama: CompiledModel) -> None:
    engine = engine_of(kind, llama)
    with pytest.raises(EngineError, match=rf"prefill: sequence 1: expected tokens of 0 to 99, got {token}"):
        engine.prefill([[5], [5, token]])
    engine.prefill([[5], [5]])
    with pytest.raises(EngineError, match=rf"decode: sequence 0: expected tokens of 0 to 99, got {token}"):
        engine.decode([token, 5])
    assert engine.state == [1, 1]
    with pytest.raises(EngineError, match=rf"forward: input_ids: expected tokens of 0 to 99, got {token}"):
        engine.forward({"input_ids": torch.tensor([[5, token]])})


@pytest.mark.parametrize("kind", ENGINES)
def test_a_forward_pass_over_nothing_is_refused(kind: type[PlanEngine], llama: CompiledModel) -> None:
    with pytest.raises(EngineError, match=r"forward: input_ids: expected at least one token, got shape \[1, 0\]"):
        engine_of(kind, llama).forward({"input_ids": torch.zeros(1, 0, dtype=torch.long)})


def test_a_refused_prefill_leaves_the_sequences_as_they_were(llama: CompiledModel) -> None:
    engine, other = engine_of(TorchCpuEngine, llama), engine_of(TorchCpuEngine, llama)
    engine.prefill([[5, 6]])
    with pytest.raises(CapacityError, match="sequence 0: expected at most 24 tokens"):
        engine.prefill([[5] * 25])
    other.prefill([[5, 6]])
    assert engine.state == [2]
    assert torch.equal(engine.decode([7]), other.decode([7]))


@pytest.mark.parametrize("kind", ENGINES)
def test_a_model_without_a_cache_only_has_a_forward_pass(kind: type[PlanEngine]) -> None:
    compiled = qcompile.compile(Gated(), "cpu-int4", example_inputs=torch.randn(2, 32))
    engine = engine_of(kind, compiled)
    x = torch.randn(5, 32)
    assert_close(engine.forward({"x": x})[0], compiled.graph.run([x])[0])
    with pytest.raises(EngineError, match="this model has no cache: expected a causal language model for prefill and decode; call forward"):
        engine.prefill([[5]])
    with pytest.raises(EngineError, match="x: expected a tensor of 2 dimensions, got 1 dimensions"):
        engine.forward({"x": torch.randn(32)})
    with pytest.raises(EngineError, match="x: expected a tensor of 2 dimensions, got none"):
        engine.forward({"y": x})


def test_engines_are_found_by_name(llama: CompiledModel) -> None:
    for name in ("reference", "torch_cpu"):
        assert make_engine(llama.contents, name=name).name == name
    assert make_engine(llama.contents).name == "native"
    with pytest.raises(EngineError, match="engine 'tpu': expected one of reference, torch_cpu, native, cuda"):
        make_engine(llama.contents, name="tpu")
