"""The store of finished results: what is read is whole and belongs to the same work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qcompile.ir.constants import Cast, tensor_constant
from qcompile.passes.work import WorkStore, content_key, work_directory
from tests.passes.test_stream import language_model


def test_results_come_back_lazily_and_exactly(tmp_path: Path) -> None:
    tensors = {"codes": torch.randint(0, 255, (3, 5), dtype=torch.uint8), "scale": torch.randn(3, 2).half(), "bias": torch.randn(4)}
    put = WorkStore("a", tmp_path).put("w", tensors)
    got = WorkStore("a", tmp_path).get("w")
    assert got is not None
    for found in (put, got):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(found[name].materialize(), tensor)


def test_other_work_and_other_names_are_told_apart(tmp_path: Path) -> None:
    store = WorkStore("a", tmp_path)
    store.put("w", {"x": torch.ones(2)})
    assert store.get("v") is None
    assert WorkStore("b", tmp_path).get("w") is None
    assert store.part("options").get("w") is None
    store.part("options").put("w", {"x": torch.zeros(2)})
    assert store.get("w")["x"].materialize().tolist() == [1, 1]  # type: ignore[index]


def test_damaged_and_unfinished_files_are_no_results(tmp_path: Path) -> None:
    store = WorkStore("a", tmp_path)
    store.put("w", {"x": torch.ones(200)})
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:300])
    assert store.get("w") is None
    path.write_bytes(b"")
    assert store.get("w") is None


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        WorkStore("a", tmp_path).put("w", {"x": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_the_oldest_results_make_room(tmp_path: Path) -> None:
    for number in range(3):
        WorkStore("a", tmp_path).put(str(number), {"x": torch.ones(1000)})
        os.utime(WorkStore("a", tmp_path)._path(str(number)), (number, number))
    WorkStore("a", tmp_path).get("0")  # used just now
    store = WorkStore("a", tmp_path, limit=14000)
    store.put("3", {"x": torch.ones(1000)})
    assert [name for name in "0123" if store.get(name) is not None] == ["0", "2", "3"]


def test_a_store_with_room_is_not_looked_through_at_every_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: looks.append(pattern) or glob(self, pattern))
    store = WorkStore("a", tmp_path)
    for number in range(5):
        store.part("b").put(str(number), {"x": torch.ones(10)})
    assert len(looks) == 1


def test_results_in_use_are_never_pruned(tmp_path: Path) -> None:
    store = WorkStore("a", tmp_path, limit=1)
    for name in "01":
        store.put(name, {"x": torch.ones(10)})
        os.utime(store._path(name), (0, 0))
    store.part("b").put("2", {"x": torch.ones(10)})
    assert store.get("0") is not None


def test_the_directory_follows_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    assert work_directory() == tmp_path / "work"
    monkeypatch.delenv("QCOMPILE_CACHE")
    assert work_directory() == Path.home() / ".cache" / "qcompile" / "work"


def test_content_keys_tell_bytes_apart_not_places() -> None:
    graph = language_model()
    name = str(graph.calls(torch.ops.aten.linear.default)[0].args[1].target)  # type: ignore[union-attr]
    weight = graph.constants[name].materialize()
    large = tensor_constant(torch.cat([weight] * 200))
    copies = []
    for constant in (
        large,
        tensor_constant(large.materialize().clone()),
        tensor_constant(large.materialize() + 1),
        large.then(Cast(torch.float16)),
    ):
        changed = graph.clone()
        changed.constants[name] = constant
        copies.append(content_key(changed))
    assert copies[0] == copies[1]
    assert len(set(copies)) == 3
    assert copies[0] != content_key(graph)
