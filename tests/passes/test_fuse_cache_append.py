"""fuse-cache-append: what it makes one operator of, what it leaves apart, and that the result is served."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from qcompile.codegen.select import backend_for
from qcompile.codegen.triton.tiles import ARCHITECTURES
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.ir.memory import buffers_in
from qcompile.ir.records import Assets
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fuse_cache_append import FuseCacheAppend
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.plan_memory import PlanMemory
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.rewrite_kv_cache import RewriteKvCache
from qcompile.quant.vector_format import vector_format
from qcompile.target import Target, parse_target
from tests.models import tiny
from tests.passes.helpers import names

qcompile = torch.ops.qcompile
HEADS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


FORMS = {"kv8": "int8 g64 sym", "kvfp8": "fp8 sym", "kv4": "int4 g64 asym", "kv4-block": "bfp4 g16 sorted"}
"""Each token packed as it comes."""
CALIBRATION = make_calibration(torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(1)), Assets())


def target_for(name: str, arch: str = "sm90") -> Target:
    """A target whose cache has these forms, and no tokens that stay as they came."""
    goal = parse_target(f"{arch}-bf16-kv8")
    form = vector_format(FORMS[name])
    return replace(goal, scheme=replace(goal.scheme, cache=replace(goal.scheme.cache, keys=form, values=form)))


@functools.cache
def prepared(name: str, head_dim: int = 16) -> Graph:
    """A tiny llama as it comes to this pass."""
    goal = target_for(name)
    graph = load(tiny("llama", **HEADS, head_dim=head_dim)).graph
    pipeline = default_pipeline(goal, "best", calibrated=False)
    names_of = [step.name for step in pipeline]
    run_pipeline(graph, pipeline[: names_of.index("fuse-cache-append")], PassContext(goal, backend_for(goal), calibration=CALIBRATION))
    return graph


def lowered(name: str, arch: str) -> PassContext:
    """What the prepared graph gives on a GPU from this pass on."""
    goal = target_for(name, arch)
    ctx = PassContext(goal, backend_for(goal), calibration=CALIBRATION)
    run_pipeline(prepared(name).clone(), [FuseCacheAppend(), LowerToKernels(), PlanMemory()], ctx)
    return ctx


def fused(graph: Graph, **options: Any) -> tuple[bool, PassContext, Counter[str]]:
    """Whether the pass changed the graph, its context, and the operators that are left."""
    ctx = PassContext(target_for("kv4"), **options)
    return FuseCacheAppend().run(graph, ctx), ctx, Counter(names(graph))


def appended(graph: Graph) -> list[torch.Tensor]:
    """The results for the example inputs: logits, then pages of every layer."""
    return graph.run([graph.interface.examples[node.name] for node in graph.placeholders])


def test_rotation_packing_and_storing_become_one_operator_bit_for_bit() -> None:
    graph = prepared("kv4").clone()
    before, count = appended(graph), Counter(names(graph))
    changed, _, after = fused(graph)
    graph.verify()
    assert changed
    assert (count["cache_append"], count["pack_vectors"], count["hadamard"]) == (2, 4, 4)
    # The queries' rotation stays: nothing is stored of them.
    assert (after["append_packed"], after["cache_append"], after["pack_vectors"], after["hadamard"]) == (2, 0, 0, 2)
    assert all(map(torch.equal, before, appended(graph)))
    assert not fused(graph)[0]


def test_a_rotation_with_a_matrix_stays_outside() -> None:
    graph = prepared("kv4", 24).clone()
    before = appended(graph)
    _, _, after = fused(graph)
    assert (after["append_packed"], after["pack_vectors"], after["hadamard"]) == (2, 0, 4)
    assert all(map(torch.equal, before, appended(graph)))


def test_tables_go_along() -> None:
    graph = prepared("kv4-block", 32).clone()
    before = appended(graph)
    changed, _, after = fused(graph)
    graph.verify()
    assert changed
    assert (after["append_packed"], after["cache_append"], after["pack_vectors"]) == (2, 0, 0)
    assert all(map(torch.equal, before, appended(graph)))
    for append, attend in zip(graph.calls(qcompile.append_packed.default), graph.calls(qcompile.cache_attend_packed.default), strict=True):
        tables = {name: list(append.kwargs[name]) for name in ("k_tables", "v_tables")}  # type: ignore[call-overload]
        assert tables == {name: list(attend.kwargs[name]) for name in tables}  # type: ignore[call-overload]


def test_a_rotation_before_a_form_with_tables_stays_outside() -> None:
    graph = prepared("kv4", 32).clone()
    packed: Any = graph.calls(qcompile.cache_append.default)[0].args[2]
    order = graph.add_constant("order", torch.randperm(32).expand(2, 32).to(torch.uint8).contiguous(), source=packed)
    packed.args = (packed.args[0], "bfp4 g16 sorted", [order])
    _, _, after = fused(graph)
    assert (after["append_packed"], after["hadamard"]) == (2, 3)
    assert graph.calls(qcompile.append_packed.default)[0].args[2].target is qcompile.hadamard.default  # type: ignore[union-attr]


@pytest.mark.parametrize("shared", ["pack_vectors", "hadamard"])
def test_what_something_else_reads_too_stays(shared: str) -> None:
    graph = prepared("kv4").clone()
    packed = graph.calls(qcompile.cache_append.default)[0].args[2]
    node = packed if shared == "pack_vectors" else packed.args[0]  # type: ignore[union-attr]
    graph.output.args = ((*graph.output.args[0], node),)  # type: ignore[misc]
    _, ctx, after = fused(graph)
    assert after["append_packed"] == (1 if shared == "pack_vectors" else 2)
    assert after["hadamard"] == 3
    assert [reason for *_, reason, _ in ctx.notes] == (["pack_vectors is read by output too"] if shared == "pack_vectors" else [])


def test_a_cache_of_numbers_is_left_alone_without_a_word_and_fuel_is_counted() -> None:
    graph = prepared("kv4").clone()
    changed, _, after = fused(graph, fuel=1)
    assert changed
    assert (after["append_packed"], after["cache_append"]) == (1, 1)
    plain = load(tiny("llama", **HEADS)).graph
    run_pipeline(plain, [Canonicalize(), RaisePatterns(), RewriteKvCache()], PassContext(parse_target("sm90-bf16")))
    changed, ctx, _ = fused(plain)
    assert not changed
    assert ctx.notes == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_that_settle_are_not_appended_and_have_kernels(arch: str) -> None:
    """The preset keeps its first tokens as they came: tables go to what packs and to what reads."""
    goal = parse_target(f"{arch}-bf16-kv4-block")
    ctx = PassContext(goal, backend_for(goal), calibration=CALIBRATION)
    graph = load(tiny("llama", **HEADS, head_dim=32)).graph
    run_pipeline(graph, default_pipeline(goal, "best", calibrated=False), ctx)
    rows = [row for row in ctx.coverage if row.operator in ("append_packed", "with_recent", "settle", "retain", "attend_settled")]
    assert Counter(row.operator for row in rows) == {"with_recent": 4, "settle": 4, "retain": 4, "attend_settled": 2}
    assert [row.reason for row in rows] == [""] * 14
    assert all(row.kernel.startswith(row.operator) for row in rows)
    settled, read = graph.calls(qcompile.settle.default), graph.calls(qcompile.attend_settled.default)
    tables = [table for node in read for name in ("k_tables", "v_tables") for table in node.kwargs[name]]  # type: ignore[union-attr]
    assert [node.args[-1] for node in settled] == [[table] for table in tables]


@pytest.mark.parametrize("cache", FORMS)
def test_packed_caches_have_kernels_on_every_gpu(cache: str) -> None:
    for arch in ARCHITECTURES:
        rows = [row for row in lowered(cache, arch).coverage if row.operator in ("append_packed", "cache_attend_packed")]
        assert Counter(row.operator for row in rows) == {"append_packed": 2, "cache_attend_packed": 2}
        assert [row.reason for row in rows] == [""] * 4, arch
        assert {row.format for row in rows if row.operator == "append_packed"} == {str(vector_format(FORMS[cache]))}
        assert all(row.kernel.startswith(row.operator) for row in rows)


def test_the_plan_writes_in_place() -> None:
    ctx = lowered("kv4", "sm90")
    for entry in ctx.products["plan"].entries.values():
        steps = [step for step in entry.steps if step.operator == "qcompile.append_packed_.default"]
        assert len(steps) == 2
        assert all(step.outputs == () and list(step.kernels) == [""] for step in steps)
        attended = [step for step in entry.steps if step.operator == "qcompile.cache_attend_packed.default"]
        for append, attend in zip(steps, attended, strict=True):
            assert list(buffers_in(append.args[:2])) == list(buffers_in(attend.args[1:3]))
            assert list(attend.kernels) == ["m1", "m2-63", "m64"]
