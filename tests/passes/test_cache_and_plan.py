"""rewrite-kv-cache, lower-to-kernels, plan-memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import pytest
import torch

from qcompile.codegen.reference import ReferenceBackend
from qcompile.codegen.select import backend_for
from qcompile.errors import PassError, UnsupportedModelError
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Entry, KernelSpec, Step
from qcompile.ir.memory import buffers_in, dtype_of, phases, root_of, with_batch
from qcompile.ir.size import evaluate
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.plan_memory import last_logits_only
from qcompile.target import parse_target
from tests.models import tiny
from tests.passes.helpers import names

qcompile = torch.ops.qcompile


def lowered(family: str, target: str = "cpu-int4", backend: ReferenceBackend | None = None, **options: int) -> tuple[Graph, PassContext]:
    """A tiny model through the default pipeline, every pass checked."""
    goal = parse_target(target)
    ctx = PassContext(goal, backend or ReferenceBackend(), **options)
    graph = load(tiny(family)).graph
    run_pipeline(graph, default_pipeline(goal), ctx, check=NumericCheck())
    return graph, ctx


@pytest.fixture(scope="module")
def llama() -> tuple[Graph, PassContext]:
    return lowered("llama", max_batch=3, max_context=64, prefill_chunk=16)


def cache_inputs(
    graph: Graph, ids: torch.Tensor, positions: torch.Tensor, page_tokens: int, pages: int, states: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Inputs of a cached graph; the pages of a sequence are handed out backwards, so that the table matters."""
    batch = ids.shape[0]
    table = torch.arange(batch * pages, dtype=torch.int32).flip(0).view(batch, pages)
    given = {"input_ids": ids, "positions": positions, "page_table": table}
    shapes = [node.meta["val"] for node in graph.placeholders if node.name not in given]
    fresh = states or [torch.zeros(batch * pages, value.shape[1], page_tokens, value.shape[3]) for value in shapes]
    state = iter(fresh)
    return [given[node.name] if node.name in given else next(state) for node in graph.placeholders]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_decoding_over_pages_of_any_size_equals_one_pass_over_everything(family: str) -> None:
    graph, _ = lowered(family, "cpu-fp32")
    ids = torch.randint(3, 90, (2, 11))
    positions = torch.arange(11).repeat(2, 1)
    whole = graph.run(cache_inputs(graph, ids, positions, 11, 1))[0]
    for page_tokens, pages in ((4, 3), (1, 11)):
        states: list[torch.Tensor] | None = None
        rows = []
        # A prompt in two chunks, then token by token.
        for part in (slice(0, 5), slice(5, 8), slice(8, 9), slice(9, 10), slice(10, 11)):
            results = graph.run(cache_inputs(graph, ids[:, part], positions[:, part], page_tokens, pages, states))
            rows.append(results[0])
            keys, values = results[1 : 1 + len(results) // 2], results[1 + len(results) // 2 :]
            states = [tensor for pair in zip(keys, values, strict=True) for tensor in pair]
        torch.testing.assert_close(torch.cat(rows, dim=1), whole, atol=1e-4, rtol=0)


def test_padding_is_not_stored_and_attends_to_nothing(llama: tuple[Graph, PassContext]) -> None:
    graph, _ = llama
    ids = torch.randint(3, 90, (1, 6))
    plain = graph.run(cache_inputs(graph, ids, torch.arange(6)[None], 8, 1))
    padded_ids = torch.cat((torch.full((1, 2), 1), ids), dim=1)
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5]])
    padded = graph.run(cache_inputs(graph, padded_ids, positions, 8, 1))
    torch.testing.assert_close(padded[0][:, 2:], plain[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1], plain[1], atol=1e-6, rtol=0)
    assert bool(torch.isfinite(padded[0]).all())


def test_the_mask_and_the_old_positions_are_gone(llama: tuple[Graph, PassContext]) -> None:
    graph, _ = llama
    assert [node.name for node in graph.placeholders][:3] == ["input_ids", "positions", "page_table"]
    assert graph.interface.kind == "cached_lm"
    assert names(graph).count("cache_append") == names(graph).count("cache_attend") == 2


def test_attention_in_both_directions_cannot_be_cached() -> None:
    from qcompile.passes.rewrite_kv_cache import RewriteKvCache

    graph = load(tiny("llama")).graph
    first = graph.calls(qcompile.attention.default)[0]
    first.args = tuple(False if index == 6 else argument for index, argument in enumerate(first.args))
    with pytest.raises(UnsupportedModelError, match=rf"rewrite-kv-cache: {first.name} .*: expected causal attention in a language model"):
        RewriteKvCache().run(graph, PassContext(parse_target("cpu-fp32")))


def test_a_mask_that_something_else_reads_is_refused_by_node() -> None:
    from qcompile.passes.rewrite_kv_cache import RewriteKvCache

    graph = load(tiny("llama")).graph
    mask = next(node for node in graph.placeholders if node.name == "attention_mask")
    (logits,) = graph.output.args[0]  # type: ignore[misc]
    summed = graph.insert(graph.output, torch.ops.aten.sum.default, (mask,))
    graph.output.args = ((graph.insert(graph.output, torch.ops.aten.add.Tensor, (logits, summed)),),)
    with pytest.raises(
        UnsupportedModelError, match=rf"{summed.name}.*: expected attention_mask to be read by attention only, got aten.sum"
    ):
        RewriteKvCache().run(graph, PassContext(parse_target("cpu-fp32")))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_prefill_computes_the_last_logits_only(family: str) -> None:
    graph, _ = lowered(family, "cpu-fp32")
    last = last_logits_only(graph)
    last.verify()
    ids = torch.randint(3, 90, (2, 6))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]])
    every = graph.run(cache_inputs(graph, ids, positions, 8, 1))[0]
    few = last.run(cache_inputs(last, ids, positions, 8, 1))[0]
    torch.testing.assert_close(few[:, 0], torch.stack((every[0, 5], every[1, 2])), atol=1e-5, rtol=0)
    assert "gather_last" in names(last)


def occupied(entry: Entry, limits: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """(first step, last step, first byte, last byte) of every planned buffer, read off the steps alone."""
    places: dict[str, list[int]] = {}
    for index, step in enumerate(entry.steps):
        for name in (*step.outputs, *buffers_in([*step.args, *step.kwargs.values()])):
            places.setdefault(root_of(entry, name), []).append(index)
    found = []
    for name, buffer in entry.buffers.items():
        if buffer.offset >= 0:
            count = 4 if buffer.dtype == "fp32" else 8
            for size in buffer.shape:
                count *= evaluate(size, limits)
            found.append((min(places[name]), max(places[name]), buffer.offset, buffer.offset + count))
    return found


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_no_two_living_buffers_share_a_byte(llama: tuple[Graph, PassContext], name: str) -> None:
    _, ctx = llama
    for plan in (ctx.products["plan"], with_batch(ctx.products["plan"], 7)):
        entry = plan.entries[name]
        spans = occupied(entry, entry.limits)
        assert len(spans) > 20
        assert max(end for *_, end in spans) <= entry.arena_bytes
        for index, (first, last, start, end) in enumerate(spans):
            for other_first, other_last, other_start, other_end in spans[:index]:
                if first <= other_last and other_first <= last:
                    assert end <= other_start or other_end <= start


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_steps_of_a_phase_touch_nothing_that_another_writes(llama: tuple[Graph, PassContext], name: str) -> None:
    _, ctx = llama
    entry = ctx.products["plan"].entries[name]
    numbers = phases(entry)
    assert numbers == sorted(numbers)
    for place, step in enumerate(entry.steps):
        for other in range(place):
            if numbers[other] == numbers[place]:
                written, touched = written_by(entry, entry.steps[other]), memory_of(entry, step)
                assert not any(overlap(one, two) for one in written for two in touched)
                written, touched = written_by(entry, step), memory_of(entry, entry.steps[other])
                assert not any(overlap(one, two) for one in written for two in touched)
    # Two layers: a norm; three projections; two rotations; the cache; attention; a projection; a norm; two; the gate; one.
    assert numbers[-1] + 1 == len({*numbers}) == 1 + 2 * 10 + {"prefill": 3, "decode": 2}[name]


Memory = tuple[str, int, int]
"""What memory, its first byte, and the one behind its last."""


def memory_of(entry: Entry, step: Step) -> list[Memory]:
    """What a step that is called reads or writes."""
    names = (*step.outputs, *buffers_in([*step.args, *step.kwargs.values()]))
    return [] if step.outputs and entry.buffers[step.outputs[0]].alias else [_memory(entry, name) for name in names]


def written_by(entry: Entry, step: Step) -> list[Memory]:
    """Results, and the cache of a step that has none."""
    names = step.outputs or [name for name in buffers_in(list(step.args)) if entry.buffers[name].kind == "state"]
    return [] if step.outputs and entry.buffers[step.outputs[0]].alias else [_memory(entry, name) for name in names]


def _memory(entry: Entry, name: str) -> Memory:
    buffer = entry.buffers[root_of(entry, name)]
    if buffer.offset < 0:
        return buffer.name, 0, 1
    count = math.prod(evaluate(size, entry.limits) for size in buffer.shape) * dtype_of(buffer.dtype).itemsize
    return "arena", buffer.offset, buffer.offset + count


def overlap(one: Memory, two: Memory) -> bool:
    """Whether both have a byte in common."""
    return one[0] == two[0] and one[1] < two[2] and two[1] < one[2]


def test_the_cache_is_written_in_place_and_heads_join_without_a_copy(llama: tuple[Graph, PassContext]) -> None:
    _, ctx = llama
    entry = ctx.products["plan"].entries["decode"]
    appends = [step for step in entry.steps if step.operator == "qcompile.cache_append_.default"]
    assert [step.args[0] for step in appends] == [{"buffer": "keys_0"}, {"buffer": "keys_1"}]
    assert all(step.outputs == () for step in appends)
    assert all(entry.buffers[name].kind == "state" for name in entry.inputs if name.startswith(("keys_", "values_")))
    attends = [step.outputs[0] for step in entry.steps if step.operator == "qcompile.cache_attend.default"]
    assert [entry.buffers[name].order for name in attends] == [(0, 2, 1, 3)] * 2
    copies = [step for step in entry.steps if step.operator == "aten.reshape.default" and not entry.buffers[step.outputs[0]].alias]
    assert copies == []


class Refusing(ReferenceBackend):
    """Refuses rotary positions and wide linears."""

    def refuses(self, spec: KernelSpec) -> str | None:
        if spec.operator == "rope":
            return "no sines here"
        return "too wide" if dict(spec.sizes).get("N", 0) > 90 else None


def test_refused_operators_run_by_reference_and_say_why() -> None:
    _, ctx = lowered("llama", backend=Refusing("refusing"))
    rows = {row.weight: row for row in ctx.coverage if row.weight}
    assert rows["lm_head.weight"].kernel == "reference"
    assert "refused by refusing: linear [m1]: too wide" in rows["lm_head.weight"].reason
    assert not rows["lm_head.weight"].chosen
    assert rows["model.layers.0.mlp.up_proj.weight"].kernel == "refusing.quantized_linear"
    steps = ctx.products["plan"].entries["decode"].steps
    assert all(not step.kernels for step in steps if step.operator == "qcompile.rope.default")


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [*product(["sm80", "sm89", "sm90", "sm100"], ["bf16", "fp16", "int8", "int4"]), ("sm80", "bf16-kv2-kivi"), ("sm90", "bf16-kv4")],
)
def test_every_operator_of_a_llama_has_a_kernel_on_every_gpu(arch: str, scheme: str) -> None:
    goal = parse_target(f"{arch}-{scheme}")
    ctx = PassContext(goal, backend_for(goal))
    graph = load(tiny("llama")).graph
    run_pipeline(graph, default_pipeline(goal), ctx)
    assert [row for row in ctx.coverage if row.reason and not row.chosen] == []
    entries = ctx.products["plan"].entries
    bare = {step.operator for entry in entries.values() for step in entry.steps if not step.kernels}
    assert bare == {"aten.reshape.default", "aten.transpose.int"}  # views
    assert set(ctx.products["plan"].kernels) == set(ctx.products["kernels"])
    kept = {"with_recent", "settle", "retain", "attend_settled"} if scheme in ("bf16-kv2-kivi", "bf16-kv4") else {"cache_attend"}
    assert kept <= {row.operator for row in ctx.coverage if row.kernel != "reference"}


@dataclass(frozen=True)
class DropMask(Pass):
    """A wrong pass: attention no longer sees which tokens are padding."""

    name: ClassVar[str] = "drop-mask"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        for node in graph.calls(qcompile.attention.default):
            node.args = (*node.args[:3], None, *node.args[4:])
        return True


def test_the_check_finds_a_pass_that_loses_the_padding() -> None:
    with pytest.raises(PassError, match="drop-mask: expected the same function within 1e-09"):
        run_pipeline(load(tiny("llama")).graph, [DropMask()], PassContext(parse_target("cpu-fp32")), check=NumericCheck())
