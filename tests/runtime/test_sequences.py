"""Sequences that join, leave, fork and are set aside between steps: each has the logits that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import CapacityError, EngineError
from qcompile.runtime.cache_layout import layout_of
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.prefixes import Beginning, next_parts, shared_beginnings
from tests.models import tiny
from tests.runtime.stories import TEXT, Story, Told, assert_as_alone

FORMATS = ("kv16", "kv8", "kv4-token", "kv4-kivi", "kv4-zip", "kv4-xquant")
ENGINES = ("reference", "torch_cpu")
CONTEXT, CHUNK = 120, 16


@pytest.fixture(scope="module", params=FORMATS)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    """A tiny model that reads prompts in chunks of sixteen tokens."""
    options = {"cache_window": 8} if request.param == "kv4-token" else {}  # so that a common beginning fills pages
    return qcompile.compile(
        tiny("llama"), f"cpu-fp32-{request.param}", recipe="nearest", prefill_chunk=CHUNK, **options, engine="torch_cpu"
    )


@pytest.fixture(scope="module")
def kivi() -> CompiledModel:
    return qcompile.compile(tiny("llama"), "cpu-fp32-kv4-kivi", recipe="nearest", prefill_chunk=CHUNK, engine="torch_cpu")


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return qcompile.compile(tiny("llama"), "cpu-fp32", recipe="nearest", prefill_chunk=CHUNK, engine="torch_cpu")


def engine_of(compiled: CompiledModel, name: str, **options: Any) -> PlanEngine:
    made = make_engine(compiled.contents, name=name, max_context=CONTEXT, **options)
    assert isinstance(made, PlanEngine)
    assert made.chunk == CHUNK
    return made


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("page_tokens", [None, 32])
def test_no_sequence_depends_on_who_shares_the_batch(
    compiled: CompiledModel, name: str, page_tokens: int | None
) -> None:  # fmt: skip
    """Bit for bit in the reference; elsewhere up to the order of sums, and the same tokens."""
    story = Story(engine_of(compiled, name, max_batch=3, page_tokens=page_tokens), seed=3)
    for _ in range(45):
        story.act()
    assert story.done == {"join", "step", "fork", "leave", "suspend", "resume"}
    assert story.engine.state == [len(told.prompt) + len(told.tokens) for _, told in sorted(story.rows.items())]
    for row, told in story.rows.items():
        assert story.engine.tokens_of(row) == told.prompt + told.tokens
    assert_as_alone(engine_of(compiled, name, max_batch=2), story.told, exact=name == "reference")


@pytest.mark.parametrize("name", ENGINES)
def test_a_full_pool_is_an_error_that_changes_nothing(compiled: CompiledModel, name: str) -> None:
    """Three rows over four pages: the fourth page goes to whoever asks first."""
    layout = engine_of(compiled, name, max_batch=3, page_tokens=32).cache.layout
    four = layout.nbytes - (layout.pages - 4) * layout.page_bytes // layout.pages
    engine = engine_of(compiled, name, max_batch=3, page_tokens=32, kv_bytes=four)
    assert engine.cache.layout.pages == 4
    prompts = [TEXT[start : start + engine.cache.layout.waiting + size] for start, size in ((0, 30), (40, 33), (50, 20))]
    told = [Told(prompt, [], [logits]) for prompt, logits in zip(prompts, engine.prefill(prompts), strict=True)]
    step = {0: 5, 1: 6, 2: 7}
    while engine.has_room([]) or engine.cache.layout.pages_for(engine.state[0] + 1) == 1:
        for one, token, logits in zip(told, step.values(), engine.step(step), strict=True):
            one.tokens.append(token)
            one.logits.append(logits)
    used, state = [engine.cache.pages_of(row) for row in range(3)], engine.state
    with pytest.raises(CapacityError, match="expected at most 0 more pages of 32 tokens, got a demand for 1; raise kv_bytes, or run fewer"):
        engine.step(step)
    assert (engine.state, [engine.cache.pages_of(row) for row in range(3)]) == (state, used)
    assert max(state) < CONTEXT
    with pytest.raises(
        CapacityError, match="expected at most 3 sequences, got 1 beside 3 there are; load with max_batch=4, or let one leave"
    ):
        engine.join([5])
    engine.leave(1)
    for _ in range(3):
        for row, logits in zip((2, 0), engine.step({2: 7, 0: 5}), strict=True):
            told[row].tokens.append(step[row])
            told[row].logits.append(logits)
    assert_as_alone(engine_of(compiled, name, max_batch=2), told, exact=name == "reference")


def test_nobody_begins_with_attention_that_others_paid() -> None:
    """What a longer sequence has added to its tokens' weights does not count for a shorter one, which would keep other tokens fine."""
    model = tiny("llama")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.q_proj.weight.data *= 8  # so that queries differ in what they look at
    ranked = qcompile.compile(model, "cpu-fp32-kv4-zip", recipe="nearest", prefill_chunk=CHUNK, engine="torch_cpu")
    engine = engine_of(ranked, "reference", max_batch=2, share_prefixes=True)
    row, _ = engine.join(TEXT[:66])
    assert [engine.cache.shareable(row, length) for length in (65, 66)] == [0, 66]
    prompt = TEXT[:40] + TEXT[200:240]
    other, logits = engine.join(prompt)
    told = Told(prompt, [], [logits])
    for token in TEXT[300:305]:
        told.tokens.append(token)
        told.logits.append(engine.step({other: token})[0])
    assert_as_alone(engine_of(ranked, "reference"), [told], exact=True)


@pytest.mark.parametrize("name", ENGINES)
def test_prompts_that_begin_alike_share_their_pages(compiled: CompiledModel, name: str) -> None:
    """A live row, three prompts at once, one of them the beginning of another."""
    common = TEXT[:70]
    live, prompts = common + TEXT[100:104], [common + TEXT[200:220], common + TEXT[200:210] + TEXT[300:303], common[:20] + TEXT[330:350]]
    shared = engine_of(compiled, name, max_batch=4, page_tokens=32, share_prefixes=True)
    apart = engine_of(compiled, name, max_batch=4, page_tokens=32)
    found, expected = ([engine.join(live)[1].unsqueeze(0), engine.join_all(prompts)[1]] for engine in (shared, apart))
    steps = [dict.fromkeys(range(4), token) for token in (9, 8, 7)]
    for engine, logits in ((shared, found), (apart, expected)):
        logits.extend(engine.step(step) for step in steps)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert shared.state == apart.state
    assert shared.cache.pool.free > apart.cache.pool.free
    for engine in (shared, apart):
        for row in engine.rows:
            engine.leave(row)
        assert engine.cache.pool.free == engine.cache.pool.pages


def test_sharing_makes_room_where_there_was_none(plain: CompiledModel) -> None:
    bytes_ = engine_of(plain, "torch_cpu", max_batch=3, page_tokens=8).cache.layout.nbytes // 2
    prompts = [[*TEXT[:80], token] for token in (5, 6, 7)]
    with pytest.raises(CapacityError, match=r"expected at most \d+ more pages of 8 tokens, got a demand for 33"):
        engine_of(plain, "torch_cpu", max_batch=3, page_tokens=8, kv_bytes=bytes_).prefill(prompts)
    engine = engine_of(plain, "torch_cpu", max_batch=3, page_tokens=8, kv_bytes=bytes_, share_prefixes=True)
    engine.join_all(prompts)
    assert [engine.cache.pages_of(row)[:10] for row in range(3)] == [list(range(10))] * 3


def test_beginnings_are_found_among_prompts_and_live_rows() -> None:
    prompts = {1: [1, 2, 3, 4], 2: [1, 2, 3, 4, 5], 4: [1, 9], 5: [8], 6: [1, 2, 3, 4]}
    live = {0: [1, 2, 3, 9, 9]}
    found = shared_beginnings(prompts, live, lambda _, length: length - length % 2)
    assert found == {1: Beginning(0, 2), 2: Beginning(1, 4), 6: Beginning(1, 3)}
    behind = shared_beginnings({1: [1, 2, 3, 9], 2: [1, 2, 7]}, live, lambda _, length: 3 if length == 3 else 1)
    assert behind == {1: Beginning(0, 3), 2: Beginning(0, 1)}, "row 1 begins beyond the place where row 2 parts from it"
    assert next_parts({1: prompts[1], 2: prompts[2]}, [0, 0, 0], {2: Beginning(1, 3)}, 8) == {1: [1, 2, 3]}
    behind = shared_beginnings({1: [1, 2, 3, 9], 2: [1, 2, 7]}, live, lambda _, length: 3 if length == 3 else 1)
    assert behind == {1: Beginning(0, 3), 2: Beginning(0, 1)}, "row 1 begins beyond the place where row 2 parts from it"
    assert next_parts({1: prompts[1], 2: prompts[2]}, [0, 3, 3], {}, 1) == {1: [4], 2: [4]}


@pytest.mark.parametrize("name", ENGINES)
def test_generating_gives_each_prompt_what_it_gets_alone(kivi: CompiledModel, name: str) -> None:
    """Seven prompts, three rows, too few pages for three long ones; greedy, and drawn with a seed."""
    prompts = [TEXT[10 * index : 10 * index + size] for index, size in enumerate((60, 3, 41, 17, 50, 8, 33))]
    few = 4 * 32 * kivi.kv_bytes_per_token + 3 * (kivi.kv_bytes_per_sequence + 5 * 4)

    def generate(count: int, **options: Any) -> Any:
        model = CompiledModel(kivi.contents, max_context=CONTEXT, max_batch=count, engine=name, page_tokens=32, kv_bytes=few)
        return model.generate(prompts, max_new_tokens=40, ignore_eos=True, **options)

    for options in ({}, {"temperature": 0.8, "seed": 4}):
        assert generate(3, **options) == generate(1, **options)


def test_sequences_of_any_lengths_share_the_bytes(plain: CompiledModel) -> None:
    model = CompiledModel(plain.contents, max_batch=4, kv_bytes=160 * plain.kv_bytes_per_token, page_tokens=8)
    assert model.max_context == 128, "as far as the model goes: a row may take nearly all pages"
    engine = model.engine
    engine.join(TEXT[:100])
    for size in (20, 7, 8):
        engine.join(TEXT[:size])
    assert engine.state == [100, 20, 7, 8]
    assert model.memory_plan.page_tables == 4 * 16 * 4


@pytest.mark.parametrize("name", ENGINES)
def test_memory_is_what_is_allocated(compiled: CompiledModel, name: str) -> None:
    model = CompiledModel(compiled.contents, max_batch=3, max_context=CONTEXT, page_tokens=16, engine=name)
    plan, engine = model.memory_plan, model.engine
    assert isinstance(engine, PlanEngine)
    cache = engine.cache
    assert plan.cache_pages + plan.cache_rows == sum(tensor.nbytes for tensor in cache.tensors.values())
    assert plan.cache_rows == sum(tensor.nbytes for name, tensor in cache.tensors.items() if name.startswith("recent"))
    assert plan.page_tables == cache.page_table.nbytes + (0 if cache.slots is None else cache.slots.nbytes)
    assert plan.cache_pages == cache.pool.pages * cache.layout.page_tokens * model.kv_bytes_per_token
    assert plan.cache_rows == 3 * model.kv_bytes_per_sequence
    assert plan.arena == engine._arena.nbytes == max(entry.arena_bytes for entry in engine._entries.values())
    assert plan.weights == sum(tensor.numel() * tensor.element_size() for tensor in engine._constants.values())
    assert plan.total == sum(plan.to_dict().values())
    assert f"{plan.total:,}" in str(plan)
    engine.prefill([TEXT[:40]])
    program = engine._programs["prefill", 1, CHUNK]
    assert program.tensors["page_table"].data_ptr() == cache.page_table.data_ptr(), "programs read the table that is counted"


def test_compiling_and_loading_take_the_sizes_of_the_cache(tmp_path: Path) -> None:
    made = qcompile.compile(
        tiny("llama"), "cpu-fp32-kv8", recipe="nearest", max_batch=2, kv_bytes=20_000, page_tokens=8, engine="torch_cpu"
    )
    made.save(tmp_path / "artifact")
    loaded = qcompile.load(tmp_path / "artifact", max_batch=2, kv_bytes=20_000, page_tokens=8, share_prefixes=True)
    for model in (made, loaded):
        plan, layout = model.memory_plan, model.engine.cache.layout  # type: ignore[attr-defined]
        assert (layout.page_tokens, layout.max_batch, model.max_context) == (8, 2, 128)
        assert 20_000 - 8 * model.kv_bytes_per_token < plan.cache_pages + plan.page_tables <= 20_000
    prompts = [[*TEXT[:30], 5], [*TEXT[:30], 6]]
    loaded.engine.join_all(prompts)
    cache = loaded.engine.cache  # type: ignore[attr-defined]
    assert cache.pages_of(0)[:3] == cache.pages_of(1)[:3]
    assert loaded.generate(prompts, max_new_tokens=5, ignore_eos=True) == made.generate(prompts, max_new_tokens=5, ignore_eos=True)
    with pytest.raises(CapacityError, match="expected kv_bytes of at least"):
        qcompile.load(tmp_path / "artifact", max_batch=2, kv_bytes=500, page_tokens=8)


def test_four_bits_take_less_than_a_third_of_sixteen() -> None:
    """Everything counted, at 4096 tokens in pages of 64 and heads of 64: 4.5 of 16 bits are 0.281."""
    bytes_ = {}
    for cache in ("kv16", "kv4"):
        model = qcompile.compile(
            tiny("llama", head_dim=64, max_position_embeddings=4096), f"cpu-fp32-{cache}", recipe="nearest", engine="torch_cpu"
        )
        layout = layout_of(model.contents.plan.entries["decode"], max_batch=1, max_context=4096, page_tokens=64)
        assert layout.table_bytes == 64 * 4
        bytes_[cache] = layout.nbytes
    assert bytes_["kv4"] <= 0.30 * bytes_["kv16"]


def test_mistakes_say_what_to_change(plain: CompiledModel) -> None:
    engine = engine_of(plain, "torch_cpu", max_batch=2, page_tokens=8)
    row, _ = engine.join([5, 6])
    gone, _ = engine.join([7])
    engine.leave(gone)
    for call in (engine.leave, engine.fork, engine.suspend, engine.tokens_of, lambda row: engine.step({row: 5})):
        with pytest.raises(
            EngineError, match=rf"row {gone}: expected one that is taken \({row}\), got one that left or never joined; join"
        ):
            call(gone)
    with pytest.raises(EngineError, match="step: expected a token for at least one row, got none"):
        engine.step({})
    with pytest.raises(EngineError, match="step: sequence 0: expected tokens of 0 to 99, got -1"):
        engine.step({row: -1})
    with pytest.raises(EngineError, match=r"join: expected at least one token in each sequence, got \[0\]"):
        engine.join([])
    with pytest.raises(EngineError, match="join: sequence 0: expected tokens of 0 to 99, got 100"):
        engine.join([100])
    with pytest.raises(CapacityError, match=r"expected at most 120 tokens, the capacity of the cache, got 121; load with max_context=121"):
        engine.join([5] * 121)
    with pytest.raises(
        CapacityError, match="join: expected at most 2 sequences, got 2 beside 1 there are; load with max_batch=3, or let one"
    ):
        engine.join_all([[5], [6]])
    engine.fork(row)
    with pytest.raises(CapacityError, match="fork: expected at most 2 sequences, got 1 beside 2"):
        engine.fork(row)
    assert engine.state == [2, 2]
    for value in (0, -1):
        with pytest.raises(CapacityError, match=f"page_tokens={value}: expected at least 1; give more, or leave it out"):
            CompiledModel(plain.contents, page_tokens=value)


def test_a_prompt_that_fails_leaves_its_row_free(plain: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(plain, "torch_cpu", max_batch=2, page_tokens=8)
    row, _ = engine.join(TEXT[:20])
    free = engine.cache.pool.free

    def fail(*_: object) -> Tensor:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "compute", fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            engine.join(TEXT[:30])
    assert (engine.rows, engine.cache.pool.free) == ((row,), free)
