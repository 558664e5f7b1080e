"""The onnxruntime engine: what it computes is what the reference computes, and sequences come and go as in any engine."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import compiled as compiled_module
from qcompile.compiled import CompiledModel
from qcompile.errors import ArtifactError, CapacityError, EngineError, ExportError, SourceError
from qcompile.evaluation import evaluate, logits_of
from qcompile.kept import make_room
from qcompile.runtime import engines
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from qcompile.runtime.engines.reference import ReferenceEngine
from tests.models import tiny
from tests.passes.helpers import Gated
from tests.runtime.artifacts.tampering import flip
from tests.runtime.stories import TEXT, Story, assert_as_alone

pytest.importorskip("onnxruntime")

from qcompile.exporters.onnx import serving

TARGETS = ("cpu-fp32", "cpu-int4", "cpu-int4-kv8-static", "cpu-fp32-kv8", "cpu-fp32-kv16")
CONTEXT, CHUNK = 120, 16
WITHIN, TURNED = 1e-4, 1 / 127
"""Of the largest logit: the order of sums; and where a cache rounds, a number at the edge of two codes that turns to the other."""
PROMPTS = [TEXT[:40], TEXT[40:43], TEXT[50:72]]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine that has exported nothing yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def compiled_for(target: str, family: str = "llama") -> CompiledModel:
    data = torch.tensor(TEXT[:128]).view(4, 32) if "static" in target else None
    engine = "torch_cpu" if target.startswith("cpu") else None
    return qcompile.compile(tiny(family), target, recipe="nearest", prefill_chunk=CHUNK, calibration=data, engine=engine)


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    made: CompiledModel = compiled_for(request.param)
    return made


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return compiled_for("cpu-fp32")


@pytest.fixture(scope="module")
def onnx() -> CompiledModel:
    return compiled_for("onnx-int4")


@pytest.fixture(scope="module")
def artifact(onnx: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny"
    onnx.save(path)
    return path


def engine_of(compiled: CompiledModel, **options: Any) -> OnnxRuntimeEngine:
    made = CompiledModel(compiled.contents, engine="onnxruntime", **{"max_context": CONTEXT, "max_batch": 3, **options}).engine
    assert isinstance(made, OnnxRuntimeEngine)
    return made


def reference_of(compiled: CompiledModel) -> ReferenceEngine:
    return ReferenceEngine(compiled.contents, max_context=CONTEXT, max_batch=3)


@pytest.mark.parametrize("page_tokens", [None, 32])
def test_sequences_come_and_go_as_if_each_were_alone(compiled: CompiledModel, page_tokens: int | None) -> None:
    """Bit for bit what the engine gives for it alone, and within the order of sums what the reference gives."""
    story = Story(engine_of(compiled, page_tokens=page_tokens), seed=3)
    for _ in range(45):
        story.act()
    assert story.done == {"join", "step", "fork", "leave", "suspend", "resume"}
    assert story.engine.state == [len(told.prompt) + len(told.tokens) for _, told in sorted(story.rows.items())]
    assert_as_alone(engine_of(compiled), story.told, exact=True)
    rounds = compiled.contents.target.count("-") > 1
    assert_as_alone(reference_of(compiled), story.told, exact=False, within=TURNED if rounds else WITHIN, same_tokens=not rounds)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_windows_and_other_heads(family: str) -> None:
    """Prompts longer than a window of five, a soft cap, rotary positions on half of a head."""
    model = compiled_for("cpu-fp32", family)
    found, expected = (engine.prefill(PROMPTS) for engine in (engine_of(model), reference_of(model)))
    torch.testing.assert_close(found, expected, rtol=0, atol=WITHIN * float(expected.abs().max()))


def test_a_token_of_minus_one_rests(plain: CompiledModel) -> None:
    engine = engine_of(plain)
    engine.prefill(PROMPTS)
    engine.decode([5, -1, 6])
    assert engine.state == [41, 3, 23]
    with pytest.raises(EngineError, match="decode: expected a token for each of the 3 sequences"):
        engine.decode([5])
    with pytest.raises(EngineError, match="step: sequence 1: expected tokens of 0 to 99, got 100"):
        engine.step({1: 100})


def test_what_does_not_fit_changes_nothing(plain: CompiledModel) -> None:
    engine = engine_of(plain, max_batch=2, page_tokens=32, kv_bytes=4 * 32 * plain.kv_bytes_per_token + 64)
    engine.prefill([TEXT[:60], TEXT[:30]])
    held = engine.state, engine.memory
    with pytest.raises(CapacityError, match="expected at most 2 sequences, got 1 beside 2 there are; load with max_batch=3, or let one"):
        engine.join([5])
    engine.leave(1)
    with pytest.raises(CapacityError, match="sequence 0: expected at most 120 tokens, the capacity of the cache, got 121; load with"):
        engine.join(TEXT[:121])
    with pytest.raises(CapacityError, match="expected at most 2 more pages of 32 tokens, got a demand for 3; raise kv_bytes"):
        engine.join(TEXT[:90])
    assert engine.has_room([31])
    assert not engine.has_room([32]), "both take a step then"
    engine.join(TEXT[:64])
    for token in (5, 6, 7, 8):
        engine.step({0: token})
    with pytest.raises(CapacityError, match="expected at most 0 more pages of 32 tokens, got a demand for 2"):
        engine.step({0: 9, 1: 9})
    assert engine.state == [64, 64]
    engine.leave(1)
    engine.step({0: 9})
    with pytest.raises(CapacityError, match="expected at most 1 more pages of 32 tokens, got a demand for 3"):
        engine.fork(0)
    assert engine.rows == (0,)
    assert held[0] == [60, 30]
    assert engine.memory.cache_pages == 3 * 32 * plain.kv_bytes_per_token, "memory for as many tokens as a row's pages have"


def test_a_common_beginning_is_read_once(plain: CompiledModel) -> None:
    shared, apart = engine_of(plain, share_prefixes=True), engine_of(plain)
    prompts = [TEXT[:50], [*TEXT[:45], 7, 8], TEXT[:20]]
    found, expected = shared.prefill(prompts), apart.prefill(prompts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert shared.state == apart.state == [50, 47, 20]


def test_a_run_that_fails_leaves_every_row_as_it_was(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, expected = engine_of(compiled), engine_of(compiled)
    for one in (engine, expected):
        one.prefill(PROMPTS)
    run, calls = engine._session.run_with_iobinding, []

    def failing(binding: Any) -> None:
        calls.append(binding)
        if len(calls) == 3:
            raise MemoryError
        run(binding)

    with monkeypatch.context() as patch:
        patch.setattr(engine._session, "run_with_iobinding", failing)
        with pytest.raises(MemoryError):
            engine.decode([9, 9, 9])
    assert engine.state == [40, 3, 22]
    for tokens in ([5, 6, 7], [8, 9, 10]):
        assert torch.equal(engine.decode(tokens), expected.decode(tokens))


def test_saved_sequences_go_on(compiled: CompiledModel, tmp_path: Path) -> None:
    engine = engine_of(compiled)
    engine.prefill(PROMPTS)
    engine.save(2, tmp_path / "one")
    other = engine_of(compiled, page_tokens=16)
    other.join([9])
    row = other.restore(tmp_path / "one")
    assert other.tokens_of(row) == PROMPTS[2]
    assert torch.equal(other.step({row: 5}), engine.step({2: 5}))


def test_engines_that_store_alike_read_each_other(plain: CompiledModel, tmp_path: Path) -> None:
    engine, reference = engine_of(plain), reference_of(plain)
    engine.save(engine.join(PROMPTS[0])[0], tmp_path / "ours")
    reference.save(reference.join(PROMPTS[0])[0], tmp_path / "theirs")
    found = engine.step({engine.restore(tmp_path / "theirs"): 5})
    torch.testing.assert_close(found, reference.step({reference.restore(tmp_path / "ours"): 5}), rtol=0, atol=WITHIN)


def test_other_forms_and_other_models_are_refused(plain: CompiledModel, tmp_path: Path) -> None:
    packed = compiled_for("cpu-fp32-kv8")
    engine = engine_of(packed)
    engine.save(engine.join(PROMPTS[0])[0], tmp_path / "packed")
    message = "expected a sequence of a cache with int8 .*, got int8 .*, as past of an ONNX file; load the model that was compiled with"
    with pytest.raises(ArtifactError, match=message):
        reference_of(packed).restore(tmp_path / "packed")
    other = engine_of(plain)
    other.save(other.join(PROMPTS[0])[0], tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"expected a sequence of model .*, got one of .*; load the artifact that saved it"):
        engine_of(compiled_for("cpu-int4")).restore(tmp_path / "plain")


def test_forward_takes_padding_on_either_side(compiled: CompiledModel) -> None:
    ids = torch.tensor(TEXT[:30]).view(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 7:] = 0
    model = CompiledModel(compiled.contents, engine="onnxruntime")
    found = model(ids, attention_mask=mask)["logits"]
    expected = CompiledModel(compiled.contents, engine="reference")(ids, attention_mask=mask)["logits"]
    within = TURNED if compiled.contents.target.count("-") > 1 else WITHIN
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=within * float(expected.abs().max()))
    assert not found[~mask.bool()].any()
    with pytest.raises(
        EngineError, match=r"forward: positions: expected 0, 1, 2 … over the tokens of each row and -1 at padding, got \[3, 4"
    ):
        model.engine.forward({"input_ids": ids[:1, :2], "positions": torch.tensor([[3, 4]])})
    with pytest.raises(EngineError, match="input_ids: expected tokens of 0 to 99, got 100"):
        model.engine.forward({"input_ids": torch.tensor([[100]])})


def test_a_plain_module_runs(tmp_path: Path) -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    made = qcompile.compile(Gated().eval(), "onnx-int8", example_inputs=x)
    expected = CompiledModel(made.contents, engine="reference")(x)
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-5)
    made.save(tmp_path / "gated")
    torch.testing.assert_close(qcompile.load(tmp_path / "gated")(x[:2]), expected[:2], rtol=0, atol=1e-5)
    with pytest.raises(EngineError, match="this model has no cache: expected a causal language model for prefill and decode; call forward"):
        made.engine.prefill([[1]])


# Targets and artifacts


def test_the_target_generates_what_the_cpu_does(onnx: CompiledModel, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx.engine.name == "onnxruntime"
    assert {row.kernel.split(".")[0] for row in onnx.coverage if row.kernel} == {"onnxruntime"}
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["onnx"]["model.onnx"]["bytes"] == (artifact / "model.onnx").stat().st_size
    monkeypatch.setattr(compiled_module, "onnx_exporter", lambda name: pytest.fail(f"{name} exports what is there"))
    loaded = qcompile.load(artifact)
    expected = CompiledModel(onnx.contents, engine="reference").generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    assert loaded.engine.name == "onnxruntime"
    assert loaded.generate(PROMPTS, max_new_tokens=12, ignore_eos=True) == expected
    assert qcompile.load(artifact, engine="reference").generate(PROMPTS, max_new_tokens=12, ignore_eos=True) == expected


def test_an_artifact_is_saved_again_with_its_file(artifact: Path, tmp_path: Path) -> None:
    qcompile.load(artifact).save(tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (artifact / "model.onnx").read_bytes()
    qcompile.load(tmp_path / "again").save(tmp_path / "again", overwrite=True)
    assert qcompile.load(tmp_path / "again").engine.prefill([[5]]).shape == (1, 100)


def test_a_damaged_file_is_refused(onnx: CompiledModel, tmp_path: Path) -> None:
    onnx.save(tmp_path / "tiny")
    path = tmp_path / "tiny" / "model.onnx"
    flip(path, path.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=r"model\.onnx: damaged: its contents do not have the SHA-256 that the manifest gives; copy"):
        qcompile.load(tmp_path / "tiny").generate([[5]], max_new_tokens=1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=r"model\.onnx: expected \d+ bytes, got \d+: it is truncated or was changed"):
        qcompile.load(tmp_path / "tiny")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx: expected a file of the artifact, got none"):
        qcompile.load(tmp_path / "tiny")


def test_without_onnxruntime_the_reference_serves_and_says_so(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engines, compiled_module):
        monkeypatch.setattr(module, "has_onnxruntime", lambda: False)
    with pytest.warns(
        UserWarning, match="compiled for onnx-int4, served by reference: the package onnxruntime is not installed; pip install"
    ):
        assert qcompile.load(artifact).engine.name == "reference"
    with pytest.raises(EngineError, match=r"expected the package onnxruntime, got none installed; pip install 'qcompile\[onnx\]'"):
        qcompile.load(artifact, engine="onnxruntime").engine  # noqa: B018  the engine is made when it is asked for
    with pytest.raises(EngineError, match="expected the package onnxruntime, got none installed"):
        OnnxRuntimeEngine(qcompile.load(artifact, engine="reference").contents, artifact / "model.onnx")


def test_without_the_packages_that_write_nothing_is_compiled(plain: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="onnx_ir")

    monkeypatch.setattr(compiled_module, "import_module", missing)
    with pytest.raises(
        SourceError, match=r"target onnx-int4: expected the packages that write ONNX, got no onnx_ir; pip install 'qcompile\["
    ):
        qcompile.compile(tiny("llama"), "onnx-int4", recipe="nearest")
    with pytest.raises(SourceError, match="engine onnxruntime: expected the packages that write ONNX, got no onnx_ir"):
        CompiledModel(plain.contents, engine="onnxruntime").engine  # noqa: B018


def test_what_onnx_does_not_express_is_refused_at_once() -> None:
    with pytest.raises(ExportError, match="expected a cache that stores every token as it comes, got one that keeps tokens"):
        compiled_for("onnx-fp32-kv4")


def test_other_artifacts_are_exported_once(plain: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain.save(tmp_path / "tiny")
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    first = qcompile.load(tmp_path / "tiny", engine="onnxruntime")
    assert first.engine.prefill([PROMPTS[0]]).shape == (1, 100)
    kept = list((tmp_path / "cache" / "onnx").iterdir())
    assert [path.name for path in kept[0].iterdir()] == ["model.onnx"]
    changed = (kept[0] / "model.onnx").stat().st_mtime_ns
    os.utime(kept[0], (1, 1))
    qcompile.load(tmp_path / "tiny", engine="onnxruntime").engine.prepare()
    assert list((tmp_path / "cache" / "onnx").iterdir()) == kept
    assert (kept[0] / "model.onnx").stat().st_mtime_ns == changed
    assert kept[0].stat().st_mtime > 1, "it was used"
    (kept[0] / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=rf"{re.escape(str(kept[0]))}.*: expected a file that onnxruntime .* runs on a CPU, got: "):
        qcompile.load(tmp_path / "tiny", engine="onnxruntime").engine.prepare()


def test_files_that_nobody_used_for_long_make_room(plain: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "cache" / "onnx"
    (kept / "old").mkdir(parents=True)
    (kept / "old" / "model.onnx").write_bytes(b"model")
    os.utime(kept / "old", (1, 1))
    plain.save(tmp_path / "tiny")
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(serving, "make_room", functools.partial(make_room, limit=1))
    qcompile.load(tmp_path / "tiny", engine="onnxruntime").engine.prepare()
    (made,) = kept.iterdir()
    assert made.name != "old"
    assert (made / "model.onnx").exists()


def test_the_engine_needs_a_file(plain: CompiledModel) -> None:
    with pytest.raises(EngineError, match="engine onnxruntime: expected the ONNX file of the model, got none"):
        make_engine(plain.contents, name="onnxruntime")


def test_the_file_of_another_model_is_refused(plain: CompiledModel, onnx: CompiledModel, tmp_path: Path) -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    other = qcompile.compile(Gated().eval(), "cpu-fp32", example_inputs=x, engine="torch_cpu")
    path = other.export_onnx(tmp_path).path
    with pytest.raises(EngineError, match=r"expected the ONNX file of this model, got one that takes .* and gives .*; save the artifact"):
        make_engine(plain.contents, name="onnxruntime", onnx_model=path).prepare()
    with pytest.raises(EngineError, match=r"got one that takes input_ids, attention_mask, past_key_values.* and gives logits, present"):
        make_engine(other.contents, name="onnxruntime", onnx_model=onnx._onnx_model()).prepare()


def test_evaluation_runs_through_it(onnx: CompiledModel) -> None:
    tokens = torch.tensor(TEXT[:96]).view(3, 32)
    result = evaluate(logits_of(onnx), tokens, logits_of(CompiledModel(onnx.contents, engine="reference")))
    assert result.kl is not None
    assert abs(result.kl) < 1e-9
    assert result.top1 == 1.0


def test_threads_are_those_of_torch(plain: CompiledModel) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = engine_of(plain)
        engine.prepare()
        assert engine._session.get_session_options().intra_op_num_threads == 2
    finally:
        torch.set_num_threads(before)


def test_one_memory_is_past_and_present_where_it_can_be(compiled: CompiledModel) -> None:
    """Numbers as they are computed in and static codes; scales of each token are joined elsewhere, and need a spare."""
    engine = engine_of(compiled)
    engine.prefill([[5, 6]])
    alone = compiled.contents.target in ("cpu-fp32", "cpu-int4", "cpu-int4-kv8-static")
    assert engine.cache.shared == alone
    assert (engine.memory.arena == 0) == alone
    before = {name: tensor.data_ptr() for name, tensor in engine.cache.past(0).items()}
    engine.decode([7])
    assert ({name: tensor.data_ptr() for name, tensor in engine.cache.past(0).items()} == before) == alone
