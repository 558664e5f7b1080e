"""The engine over the stub: toy plans for order and capture, real plans for every operand of every kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import frontend
from qcompile.codegen.triton.backend import TritonBackend
from qcompile.errors import CapacityError, EngineError, UntrustedCodeError
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.lowered import Entry, Kernel, Plan
from qcompile.ir.records import Assets
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.engines.cuda import CudaEngine, batch_buckets, bucket_of, require_architecture
from qcompile.runtime.engines.reference import ReferenceEngine
from qcompile.runtime.sequences import SequenceEngine
from qcompile.target import parse_target
from tests.models import tiny
from tests.runtime.cuda.plans import BINARIES, buffer, entry, integer, kernel, launch, pointer, step
from tests.runtime.cuda.stubbed import Stub


@dataclass(frozen=True)
class Parts:
    """What the engine takes from an artifact."""

    plan: Plan
    kernels: Mapping[str, Kernel]
    binaries: Mapping[str, bytes]
    constants: Mapping[str, Constant]
    target: str = "sm90-int4"
    trusted: bool = True

    def require_native(self) -> None:
        if not self.trusted:
            raise UntrustedCodeError("expected kernels built on this machine")


APPEND = kernel("append", "cache_append_", launch("append_i64", pointer("positions", "i64"), pointer("keys", "i64"), integer("n", "rows")))
EMBED = kernel("embed", "embedding", launch("gather", pointer("indices", "i64"), pointer("weight"), pointer("out"), grid=("rows", 1, 1)))
TABLE = torch.arange(40, dtype=torch.float32).view(10, 4)


def toy_plan(chunk: int, embed: str = "embed") -> Plan:
    """Logits are rows of a table; the only sequence's positions are written into the cache by a kernel that computes."""

    def build(name: str, sequence: int) -> Entry:
        states = [buffer(f"{part}_0", "state", ("pages", 1, "page_tokens", 1), "int64") for part in ("keys", "values")]
        tokens = [buffer(part, "input", ("batch", "sequence"), "int64") for part in ("input_ids", "positions")]
        table = [buffer("page_table", "input", ("batch", "pages_per_sequence"), "int32"), buffer("w", "constant", (10, 4))]
        news = [buffer("k", "intermediate", ("batch", 1, "sequence", 1), "int64", alias="positions")]
        steps = [
            step("aten.unflatten.int", "positions", 0, [-1, 1], out="u"),
            step("aten.unsqueeze.default", "u", -1, out="k"),
            step("qcompile.cache_append_.default", "keys_0", "values_0", "k", "k", "page_table", "positions", kernels={"": "append"}),
            step("aten.embedding.default", "w", "input_ids", out="rows", kernels={"": embed} if embed else {}, node="embedding_0"),
        ]
        news.append(buffer("u", "intermediate", ("batch", 1, "sequence"), "int64", alias="positions"))
        news.append(buffer("rows", "output" if name == "decode" else "intermediate"))
        if name == "prefill":
            news.append(buffer("last", "output", ("batch", 1, 4)))
            steps.append(step("qcompile.gather_last.default", "rows", "positions", out="last"))
        made = entry([*tokens, *table, *states, *news], steps, ("rows" if name == "decode" else "last",), name)
        return replace(made, limits={"batch": 4, "sequence": sequence})

    return Plan({name: build(name, size) for name, size in (("prefill", chunk), ("decode", 1))}, ("append", "embed"))


def toy_engine(stub: Stub, *, chunk: int = 4, embed: str = "embed", max_batch: int = 1, max_context: int = 16, **sizes: Any) -> CudaEngine:
    parts = Parts(toy_plan(chunk, embed), {"append": APPEND, "embed": EMBED}, BINARIES, {"w": tensor_constant(TABLE)})
    return CudaEngine(parts, max_batch=max_batch, max_context=max_context, device="cpu", driver=Driver(stub.path), **sizes)


def keys(engine: CudaEngine) -> list[int]:
    return engine.cache.tensors["keys_0"].flatten().tolist()


def test_prefill_goes_in_chunks_and_stores_no_padding(stub: Stub) -> None:
    engine = toy_engine(stub)
    engine.prepare()
    before = len(stub.calls("cuLaunchKernel"))
    engine.prefill([[7, 8, 9, 1, 2, 3]])
    launches = stub.calls("cuLaunchKernel")[before:]
    assert [call.detail for call in launches] == [b"append_i64", b"gather"] * 2, "two chunks of four for six tokens"
    assert keys(engine) == [*range(6), *[0] * 10]
    assert engine.state == [6]


def test_decode_replays_one_graph_per_bucket(stub: Stub) -> None:
    engine = toy_engine(stub, max_batch=6)
    engine.prepare()
    assert engine.captured_buckets == [1, 2, 4, 6]
    assert len(stub.calls("cuGraphInstantiateWithFlags")) == 4
    engine.prefill([[1], [2], [3]])
    before = len(stub.calls())
    engine.decode([4, 5, 6])
    names = [call.name for call in stub.calls()[before:] if call.name != b"cuCtxSetCurrent"]
    assert names == [b"cuGraphLaunch"]
    program = engine._decode[4].program  # type: ignore[union-attr]
    assert program.inputs["input_ids"].flatten().tolist() == [4, 5, 6, 0]
    assert program.inputs["positions"].flatten().tolist() == [1, 1, 1, -1], "the row that fills the bucket is padding"
    assert program.inputs["page_table"].flatten().tolist() == [0, 1, 2, 0], "page 0 is never read for padding"
    assert engine.state == [2, 2, 2]


def test_the_replayed_graph_reads_new_positions(stub: Stub) -> None:
    engine = toy_engine(stub)
    engine.prefill([[5, 6]])
    for token in (1, 2, 3):
        engine.decode([token])
    assert keys(engine) == [0, 1, 2, 3, 4, *[0] * 11]


def test_capture_writes_nothing_into_the_cache(stub: Stub) -> None:
    engine = toy_engine(stub)
    engine.prepare()
    assert stub.launched().count("append_i64") == 2, "a warm-up and a recording"
    assert keys(engine) == [0] * 16


def test_a_step_that_cannot_be_captured_turns_graphs_off_and_is_named(stub: Stub) -> None:
    engine = toy_engine(stub, embed="", max_batch=2)
    with pytest.warns(
        RuntimeWarning,
        match=r"the CUDA graph is off .* embedding_0 \(aten.embedding.default\): it is computed on cpu",
    ) as caught:
        engine.prepare()
    assert len(caught) == 1
    assert engine.captured_buckets == []
    logits = engine.prefill([[7, 3], [2]])
    assert torch.equal(logits, TABLE[[3, 2]])
    assert torch.equal(engine.decode([4, 9]), TABLE[[4, 9]])
    assert stub.calls("cuGraphLaunch") == []


def test_a_capture_that_fails_is_survived(stub: Stub) -> None:
    engine = toy_engine(stub)
    stub.fail("cuLaunchKernel", 900, nth=3)
    with pytest.warns(RuntimeWarning, match=r"got kernel append: .*CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        engine.prepare()
    engine.prefill([[5, 6]])
    engine.decode([1])
    assert keys(engine)[:4] == [0, 1, 2, 0]


def test_a_finished_sequence_takes_no_part(stub: Stub) -> None:
    engine = toy_engine(stub, max_batch=2, max_context=3)
    engine.prefill([[1, 2, 3], [4]])
    engine.decode([-1, 5])
    program = engine.program(2)
    assert program.inputs["positions"].flatten().tolist() == [-1, 1]
    assert program.inputs["input_ids"].flatten().tolist() == [0, 5]
    assert engine.state == [3, 2]


def test_rows_that_leave_and_join_are_written_before_the_replay(stub: Stub) -> None:
    engine = toy_engine(stub, max_batch=4, page_tokens=2)
    engine.join_all([[5, 6], [7], [8, 9, 1]])
    engine.leave(1)
    before = len(stub.calls())
    engine.step({2: 3, 0: 4})
    assert [call.name for call in stub.calls()[before:] if call.name != b"cuCtxSetCurrent"] == [b"cuGraphLaunch"]
    program = engine.program(2)
    assert program.inputs["positions"].flatten().tolist() == [3, 2]
    assert program.inputs["page_table"][:, :2].tolist() == [[2, 3], [0, 1]], "row 1 gave page 1 back, which row 0 needed"
    assert engine.join([2])[0] == 1
    engine.step({1: 6, 2: 6, 0: 6})
    program = engine.program(4)
    assert program.inputs["positions"].flatten().tolist() == [1, 4, 3, -1], "the row that fills the bucket is padding"
    assert program.inputs["input_ids"].flatten().tolist() == [6, 6, 6, 0]
    assert program.inputs["page_table"][3].tolist() == [0] * 8
    assert (engine.rows, engine.state) == ((0, 1, 2), [4, 2, 5])


def test_a_fork_copies_the_page_that_it_writes(stub: Stub) -> None:
    engine = toy_engine(stub, max_batch=2, page_tokens=4)
    row, _ = engine.join([1, 2, 3, 4, 5])
    new = engine.fork(row)
    assert engine.cache.pages_of(new) == engine.cache.pages_of(row) == [0, 1]
    engine.step({new: 6})
    assert (engine.cache.pages_of(row), engine.cache.pages_of(new)) == ([0, 1], [0, 2])
    # The toy kernel writes position p to place p, whatever the table says: page 2 was copied before it ran.
    assert keys(engine)[:12] == [0, 1, 2, 3, 4, 5, 0, 0, 4, 0, 0, 0]


def test_untrusted_binaries_are_never_loaded(stub: Stub) -> None:
    parts = Parts(toy_plan(4), {"append": APPEND, "embed": EMBED}, BINARIES, {}, trusted=False)
    with pytest.raises(UntrustedCodeError, match="expected kernels built on this machine"):
        CudaEngine(parts, device="cpu", driver=Driver(stub.path))
    with pytest.raises(EngineError, match="device: expected one that runs sm100, got sm90"):
        CudaEngine(replace(parts, trusted=True, target="sm100-bf16"), device="cpu", driver=Driver(stub.path))
    assert stub.calls("cuModuleLoadData") == []


def test_everything_is_given_back(stub: Stub) -> None:
    engine = toy_engine(stub, max_batch=2)
    engine.prepare()
    engine.close()
    for made, freed in (
        ("cuGraphInstantiateWithFlags", "cuGraphExecDestroy"),
        ("cuModuleLoadData", "cuModuleUnload"),
        ("cuStreamCreate", "cuStreamDestroy_v2"),
    ):
        assert len(stub.calls(made)) == len(stub.calls(freed)) > 0
    assert len(stub.calls("cuModuleLoadData")) == 1, "one binary, one module"
    assert stub.calls()[-1].name == b"cuDevicePrimaryCtxRelease_v2"


def test_capacity_and_misuse(stub: Stub) -> None:
    engine = toy_engine(stub, max_batch=2, max_context=4)
    with pytest.raises(CapacityError, match=r"prefill: expected at most 2 sequences, got 3; load with max_batch=3"):
        engine.prefill([[1]] * 3)
    with pytest.raises(
        CapacityError, match=r"sequence 1: expected at most 4 tokens, the capacity of the cache, got 5; load with max_context=5"
    ):
        engine.prefill([[1], [1] * 5])
    with pytest.raises(EngineError, match=r"prefill: expected at least one token in each sequence, got \[0\]"):
        engine.prefill([[]])
    engine.prefill([[1, 2, 3]])
    with pytest.raises(EngineError, match=r"decode: expected a token for each of the 1 sequences of the batch, got 2"):
        engine.decode([1, 2])
    engine.decode([1])
    with pytest.raises(CapacityError, match=r"sequence 0: expected at most 4 tokens, the capacity of the cache, got 1 after 4 held"):
        engine.decode([1])
    assert engine.state == [4]


@pytest.mark.parametrize(
    ("arch", "device", "runs"), [("sm90", "sm90", True), ("sm80", "sm89", True), ("sm90", "sm100", False), ("sm80", "sm90", False)]
)
def test_binaries_run_on_their_architecture_only(arch: str, device: str, runs: bool) -> None:
    if runs:
        require_architecture(arch, device)
        return
    with pytest.raises(EngineError, match=f"device: expected one that runs {arch}, got {device}; compile with target={device}-"):
        require_architecture(arch, device)


def test_buckets_are_powers_of_two_and_the_greatest_batch() -> None:
    assert batch_buckets(1) == [1]
    assert batch_buckets(8) == [1, 2, 4, 8]
    assert batch_buckets(12) == [1, 2, 4, 8, 12]
    assert [bucket_of(count, 12) for count in (1, 3, 8, 9, 12)] == [1, 4, 8, 12, 12]


CALIBRATED = ("sm90-bf16-kv4-block",)
"""Targets whose caches have tables."""


def compiled(target: str, family: str, triton: bool) -> tuple[Parts, torch.nn.Module]:
    """A tiny model through the default pipeline; every launch comes from the toy binary, where it has no effect."""
    model, goal = tiny(family), parse_target(target)
    graph = frontend.load(model).graph
    backend = TritonBackend(goal.arch) if triton else None
    data = make_calibration(torch.randint(0, 100, (2, 16)), Assets()) if target in CALIBRATED else None
    ctx = PassContext(goal, backend, max_batch=2, max_context=96, prefill_chunk=8, calibration=data)
    run_pipeline(graph, default_pipeline(goal), ctx)
    kernels = {
        name: replace(item, launches=tuple(replace(launch, binary="toy.cubin") for launch in item.launches))
        for name, item in ctx.products.get("kernels", {}).items()
    }
    return Parts(ctx.products["plan"], kernels, BINARIES, graph.constants), model


def real_engine(stub: Stub, parts: Parts, **sizes: Any) -> CudaEngine:
    return CudaEngine(parts, **{"max_batch": 2, "max_context": 32, **sizes}, device="cpu", driver=Driver(stub.path))


def greedy(engine: CudaEngine, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    tokens = [engine.prefill(prompts).argmax(-1)]
    while len(tokens) < count:
        tokens.append(engine.decode(tokens[-1]).argmax(-1))
    return torch.stack(tokens, dim=1).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_references_alone_give_the_models_own_tokens(stub: Stub, family: str) -> None:
    parts, model = compiled("reference-fp32", family, triton=False)
    engine = real_engine(stub, parts)
    prompts = [list(range(3, 14)), [20, 21, 22]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = greedy(engine, prompts, 6)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for token in tokens:
            assert int(model(ids).logits[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cache", ["kv16", "kv4-kivi"])
def test_sequences_come_and_go_as_on_the_cpu(stub: Stub, cache: str, tmp_path: Path) -> None:
    """The same actions on the reference engine over the same plan; a sequence moves from one to the other and back."""
    parts, _ = compiled(f"reference-fp32-{cache}", "llama", triton=False)
    ours = real_engine(stub, parts, max_batch=3, max_context=100, page_tokens=32)
    theirs = ReferenceEngine(parts, max_batch=3, max_context=100)  # type: ignore[arg-type]

    def both(act: Callable[[SequenceEngine], Any]) -> Any:
        found, expected = act(ours), act(theirs)
        for mine, other in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
            if isinstance(mine, Tensor):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * float(other.abs().max()))
            else:
                assert mine == other
        return found

    text = torch.randint(3, 100, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    assert both(lambda engine: engine.join_all([text[:70], text[:5]]))[0] == [0, 1]
    assert both(lambda engine: engine.fork(0)) == 2
    both(lambda engine: engine.step({2: 5, 1: 6}))
    both(lambda engine: engine.leave(1))
    assert both(lambda engine: engine.join(text[20:60]))[0] == 1
    for token in text[70:80]:
        both(lambda engine: engine.decode([token, -1, 9])[[0, 2]])  # noqa: B023
    ours.save(0, tmp_path / "ours")
    theirs.save(2, tmp_path / "theirs")
    both(lambda engine: [engine.leave(row) for row in (0, 2)])
    assert both(lambda engine: [engine.restore(tmp_path / name) for name in ("theirs", "ours")]) == [0, 2]
    both(lambda engine: engine.step({0: 3, 1: 4, 2: 5}))
    assert ours.state == theirs.state == [82, 41, 81]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_memory_is_what_is_allocated(stub: Stub) -> None:
    parts, _ = compiled("reference-fp32-kv4-kivi", "llama", triton=False)
    engine = real_engine(stub, parts, page_tokens=32)
    plan, cache = engine.memory, engine.cache
    tables = [cache.page_table, *([] if cache.slots is None else [cache.slots])]
    assert plan.cache_pages + plan.cache_rows == sum(tensor.nbytes for tensor in cache.tensors.values())
    assert plan.page_tables == sum(tensor.nbytes for tensor in tables) == 2 * (1 + 1) * 4
    context = engine._context
    assert plan.weights == sum(tensor.nbytes for tensor in context.constants._uploaded.values()) > 0
    assert plan.arena == sum(tensor.nbytes for arena in (context.arena, context.workspace) for tensor in arena._kept) > 0


def test_forward_gives_every_position(stub: Stub) -> None:
    parts, model = compiled("reference-fp32", "llama", triton=False)
    engine = real_engine(stub, parts)
    ids = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
    logits = engine.forward({"input_ids": ids})[0]
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError, match=r"forward: expected the inputs input_ids, positions, page_table, .*, got none called input_ids"):
        engine.forward({})
    with pytest.raises(EngineError, match=r"forward: positions: expected 5 along axis 1 \(sequence\), got 4"):
        engine.forward({"input_ids": ids, "positions": torch.arange(4).expand(2, 4)})
    with pytest.raises(EngineError, match=r"forward: positions: expected 2 axes, got shape \(5,\)"):
        engine.forward({"input_ids": ids, "positions": torch.arange(5)})


@pytest.mark.parametrize("target", ["sm90-int4", "sm90-int8", "sm90-bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_emitted_kernel_gets_what_it_assumes(stub: Stub, target: str, family: str) -> None:
    """Alignments, strides, dtypes, operand names and grids of a whole model, for decode and prefill."""
    parts, _ = compiled(target, family, triton=True)
    engine = real_engine(stub, parts)
    engine.prepare()
    launched = set(stub.launched())
    linear = "linear" if target == "sm90-bf16" else "quantized_linear"
    assert {"cache_append_", "cache_attend", "merge_shares", "rope", "rotary_table", "gated_activation", "embedding", linear} <= launched


@pytest.mark.parametrize("cache", ["kv4-kivi", "kv4-block"])
def test_kernels_of_a_cache_with_rows_get_what_they_assume(stub: Stub, cache: str) -> None:
    parts, _ = compiled(f"sm90-bf16-{cache}", "llama", triton=True)
    engine = real_engine(stub, parts)
    engine.prepare()
    assert engine.captured_buckets == [1, 2]
    before = len(stub.launched())
    engine.prefill([list(range(3, 20)), [7]])
    prefill = stub.launched()[before:]
    # Two of each a layer, for keys and for values; prompts are read in chunks of 8.
    assert [prefill.count(name) for name in ("with_recent", "settle_", "retain_", "attend_settled", "merge_shares")] == [12, 12, 12, 6, 0]
    assert "merge_shares" in stub.launched()[:before]


def test_pages_hold_whole_groups_of_tokens_whatever_is_asked_for(stub: Stub) -> None:
    parts, _ = compiled("sm90-bf16-kv4-kivi", "llama", triton=True)
    engine = CudaEngine(parts, max_batch=2, max_context=50, device="cpu", driver=Driver(stub.path))
    engine.prepare()
    engine.forward({"input_ids": torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])})
    assert stub.launched().count("settle_") >= 2
