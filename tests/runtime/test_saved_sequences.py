"""A sequence that was saved goes on elsewhere; what cannot be continued is refused with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import ArtifactError, CapacityError, EngineError
from qcompile.runtime import saved_sequence
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.base import PlanEngine
from tests.models import tiny

TEXT = torch.randint(3, 100, (120,), generator=torch.Generator().manual_seed(2)).tolist()
LENGTH = 90


def model_of(cache: str) -> CompiledModel:
    return qcompile.compile(tiny("llama"), f"cpu-fp32-{cache}", recipe="nearest", prefill_chunk=32, engine="torch_cpu")


@pytest.fixture(scope="module", params=["kv16", "kv8", "kv4-kivi", "kv4-zip", "kv4-xquant"])
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return model_of(request.param)


@pytest.fixture(scope="module")
def kivi() -> CompiledModel:
    return model_of("kv4-kivi")


def engine_of(compiled: CompiledModel, name: str = "reference", **options: Any) -> PlanEngine:
    made = make_engine(compiled.contents, name=name, **{"max_context": 120, "max_batch": 3, **options})
    assert isinstance(made, PlanEngine)
    return made


def continued(engine: PlanEngine, row: int) -> Tensor:
    return torch.cat([engine.step({row: token}) for token in TEXT[LENGTH : LENGTH + 12]])


@pytest.fixture
def saved(kivi: CompiledModel, tmp_path: Path) -> Path:
    """A sequence of the cache that keeps some tokens as they came."""
    engine = engine_of(kivi)
    row, _ = engine.join(TEXT[:LENGTH])
    engine.save(row, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def test_other_pages_and_another_engine_go_on_alike(compiled: CompiledModel, tmp_path: Path) -> None:
    first = engine_of(compiled)
    first.join([9, 9, 9])
    row, _ = first.join(TEXT[:LENGTH])
    first.save(row, tmp_path / "sequence")
    assert [path.name for path in tmp_path.iterdir()] == ["sequence"]
    expected = continued(first, row)
    same = engine_of(compiled, page_tokens=32)
    place = same.restore(tmp_path / "sequence")
    assert (same.rows, same.state, same.tokens_of(place)) == ((place,), [LENGTH], TEXT[:LENGTH])
    assert torch.equal(continued(same, place), expected)
    other = engine_of(compiled, "torch_cpu", page_tokens=64)
    other.join([5, 6, 7])
    found = continued(other, other.restore(tmp_path / "sequence"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_an_artifact_that_was_loaded_goes_on_with_what_the_compiled_model_saved(kivi: CompiledModel, saved: Path, tmp_path: Path) -> None:
    kivi.save(tmp_path / "artifact")
    engine = qcompile.load(tmp_path / "artifact", engine="reference", max_batch=2, max_context=120).engine
    other = engine_of(kivi)
    row, _ = other.join(TEXT[:LENGTH])
    assert torch.equal(engine.step({engine.restore(saved): 5}), other.step({row: 5}))


def test_a_file_holds_the_bytes_of_the_sequence_and_no_more(kivi: CompiledModel, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        shapes = {name: list(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    # Of 90 tokens the first 4 stay, 32 have settled: one group ended at least 32 tokens ago.
    assert shapes["keys_0"][1] == shapes["values_1"][1] == 32
    assert shapes["recent_keys_1"] == [2, 90 - 32, 8]
    assert (header["version"], header["length"], json.loads(header["tokens"])) == ("1", "90", TEXT[:LENGTH])
    assert header["cache"].startswith("int4 t32 asym, int4 g32 asym, 4 first and 32 recent tokens in fp16")
    assert kivi.kv_bytes_per_sequence > sum(2 * 58 * 8 * 2 for _ in range(4))


def resaved(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """The file again with other tensors or another header, and with the checksum that goes with them."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = dict(file.metadata())
    change(tensors, header)
    header["sha256"] = saved_sequence.checksum(tensors)
    save_file(tensors, path, metadata=header)


def assert_refused(engine: PlanEngine, path: Path, message: str, kind: type[Exception] = ArtifactError) -> None:
    before = engine.rows, engine.state, engine.cache.pool.free
    with pytest.raises(kind, match=message):
        engine.restore(path)
    assert (engine.rows, engine.state, engine.cache.pool.free) == before


def test_another_model_is_refused(saved: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 0.5  # type: ignore[union-attr, index, operator]
    other = qcompile.compile(model, "cpu-fp32-kv4-kivi", recipe="nearest", prefill_chunk=32, engine="torch_cpu")
    assert_refused(
        engine_of(other), saved, r"expected a sequence of model \w{16}, got one of \w{16}; load the artifact that saved it, or read"
    )


@pytest.mark.parametrize("cache", ["kv4", "kv8", "kv2-kivi"])
def test_another_cache_format_is_refused(saved: Path, cache: str) -> None:
    message = r"expected a sequence of a cache with .*, got int4 t32 asym, int4 g32 asym, 4 first .*; load the model that was compiled with"
    assert_refused(engine_of(model_of(cache)), saved, message)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_a_truncated_file_is_refused(kivi: CompiledModel, saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    assert_refused(engine_of(kivi), saved, r"restore: .*one\.safetensors: expected a whole file that save\(\) wrote, got .*; copy it again")


def test_a_flipped_bit_is_found(kivi: CompiledModel, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-7] ^= 4
    saved.write_bytes(content)
    assert_refused(engine_of(kivi), saved, r"expected the bytes that save\(\) wrote, got others; copy it again, or save anew")


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors, header: header.update(version="2"), "expected layout version 1, got 2; save it with this version of qcompile"),
    (lambda tensors, header: header.pop("cache"), r"expected a file that save\(\) wrote, got other tensors; check the path"),
    (lambda tensors, header: header.update(kind="weights"), r"expected a file that save\(\) wrote, got other tensors"),
    (lambda tensors, header: header.update(length="91", tokens="null"), "expected the tensors of a sequence of 91 tokens, got others"),
    (lambda tensors, header: tensors.pop("keys_1"), "expected the tensors of a sequence of 90 tokens, got others"),
    (lambda tensors, header: header.update(length="many"), "expected a header that counts tokens, got length='many'"),
    (lambda tensors, header: header.update(length="-3"), "expected a header that counts tokens, got length='-3'"),
    (lambda tensors, header: header.update(tokens="[1, 2]"), "expected a header that counts tokens, got length='90' and 2 tokens"),
    (lambda tensors, header: header.update(tokens="{"), "expected a header that counts tokens, got"),
])  # fmt: skip
def test_a_header_that_does_not_fit_is_refused(
    kivi: CompiledModel, saved: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str
) -> None:
    resaved(saved, change)
    assert_refused(engine_of(kivi), saved, message)


def test_no_room_is_an_error_before_anything_changes(kivi: CompiledModel, saved: Path) -> None:
    assert_refused(engine_of(kivi, max_context=80), saved, "sequence 0: expected at most 80 tokens, .* got 90; load with", CapacityError)
    full = engine_of(kivi, max_batch=1)
    full.join([5])
    assert_refused(full, saved, "expected at most 1 sequences, got 1 beside 1 there are; load with max_batch=2, or let one", CapacityError)
    few = engine_of(kivi, max_batch=2, page_tokens=32, kv_bytes=2 * 32 * kivi.kv_bytes_per_token + 2 * kivi.kv_bytes_per_sequence + 24)
    few.join(TEXT[:101])
    assert_refused(few, saved, "expected at most 0 more pages of 32 tokens, got a demand for 1; raise kv_bytes", CapacityError)


def test_paths_that_cannot_be_read_or_written(kivi: CompiledModel, tmp_path: Path) -> None:
    engine = engine_of(kivi)
    row, _ = engine.join([5, 6])
    with pytest.raises(ArtifactError, match=r"restore: .*nothing: expected a file that save\(\) wrote, got none there; check the path"):
        engine.restore(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"save: .*: expected a path that can be written, got .*; choose another or make room"):
        engine.save(row, tmp_path / "no" / "folder")
    with pytest.raises(EngineError, match=r"save: row 2: expected one that is taken \(0\)"):
        engine.save(2, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_whole(kivi: CompiledModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, before = engine_of(kivi), saved.read_bytes()
    row, _ = engine.join([5, 6])

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(ArtifactError, match="disk full"):
            engine.save(row, saved)
    assert saved.read_bytes() == before
    engine.save(row, saved)
    assert engine.tokens_of(engine.restore(saved)) == [5, 6]


def test_tokens_that_nobody_saw_are_not_made_up(kivi: CompiledModel, tmp_path: Path) -> None:
    engine = engine_of(kivi)
    row, _ = engine.join([5, 6])
    engine.save(engine.resume(replace(engine.suspend(row), tokens=None)), tmp_path / "one")
    assert engine.tokens_of(engine.restore(tmp_path / "one")) is None
