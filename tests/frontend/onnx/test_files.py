"""What is wrong with a file is named: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

import onnx
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper

from qcompile.errors import SourceError, TraceError, UnsupportedModelError
from qcompile.frontend import load
from qcompile.frontend.onnx.weights import Weight
from tests.frontend.onnx.making import FLOAT, make, node, random, saved


def _linear(weight: Any = None) -> ModelProto:
    nodes = [node("MatMul", "x w", "y")]
    return make(nodes, {"x": (["batch", 4], FLOAT)}, "y", {"w": random(4, 3) if weight is None else weight})


def _external(folder: Path, change: Callable[[TensorProto], None] = lambda _: None) -> Path:
    """A linear whose weight [4, 3] lies in `model.data` from byte 16 on, after `change` of where it says so."""
    weight = random(4, 3)
    (folder / "model.data").write_bytes(bytes(16) + weight.tobytes())
    tensor = numpy_helper.from_array(weight, "w")
    external_data_helper.set_external_data(tensor, "model.data", offset=16, length=48)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    change(tensor)
    return saved(_linear(tensor), folder)


def _entry(key: str, value: str) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        for item in tensor.external_data:
            if item.key == key:
                item.value = value

    return change


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    graph = load(_external(tmp_path)).graph
    (constant,) = [graph.constants[name] for name in graph.constants if name == "w"]
    assert constant.key.startswith("onnx:model.onnx:w")
    x = torch.randn(5, 4)
    assert torch.allclose(graph(x=x), x @ torch.from_numpy(random(4, 3)), atol=1e-6)


@pytest.mark.parametrize("external", [True, False])
def test_a_large_weight_is_not_read_before_it_is_needed(external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(128, 64)
    path = tmp_path / "model.onnx"
    model = make([node("MatMul", "x w", "y")], {"x": (["batch", 128], FLOAT)}, "y", {"w": weight})
    onnx.save(model, path, save_as_external_data=external, location="model.data", size_threshold=0)
    read: list[str] = []
    original = Weight.load
    monkeypatch.setattr(Weight, "load", lambda self: read.append(self.name) or original(self))
    graph = load(path).graph
    assert read == []
    x = torch.randn(2, 128)
    assert torch.allclose(graph(x=x), x @ torch.from_numpy(weight), atol=1e-4)
    assert read == ["w"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_entry("location", "gone.data"), r"initialiser 'w': expected external data in .*gone.data, got no such file"),
        (_entry("location", "/etc/passwd"), r"expected external data beside the model, got the path '/etc/passwd'"),
        (_entry("location", "../model.data"), r"got the path '../model.data', which leaves its folder"),
        (_entry("offset", "17"), r"expected 48 bytes from offset 17 of .*model.data, got a file of 64 bytes"),
        (_entry("length", "40"), r"expected 48 bytes of external data for its shape, got a length of 40"),
        (_entry("offset", "-1"), r"expected a number as offset of its external data, got '-1'"),
        (lambda tensor: tensor.ClearField("external_data"), r"expected the name of the file that holds it, got none"),
    ],
)
def test_external_data_that_is_not_there(change: Callable[[TensorProto], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        load(_external(tmp_path, change))


def test_external_data_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    path = _external(inside)
    (inside / "model.data").rename(tmp_path / "model.data")
    (inside / "model.data").symlink_to(tmp_path / "model.data")
    with pytest.raises(SourceError, match=r"got 'model.data', a link out of its folder; copy the file"):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing.onnx: expected an ONNX file, got none"):
        load(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("content", [b"not a model at all", b"", b"\x08\x08"])
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(SourceError, match=r"model.onnx: expected an ONNX model.*download it again"):
        load(tmp_path / "model.onnx")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = saved(_linear(), tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match=r"expected an ONNX model, got a file that is damaged"):
        load(path)


@pytest.mark.parametrize("opset", [6, 99])
def test_an_unknown_opset(opset: int, tmp_path: Path) -> None:
    model = _linear()
    model.opset_import[0].version = opset
    with pytest.raises(UnsupportedModelError, match=rf"expected opset 7 to 28, got opset {opset}; convert the model"):
        load(saved(model, tmp_path))


def test_an_unknown_domain(tmp_path: Path) -> None:
    model = make([helper.make_node("Secret", ["x"], ["y"], domain="org.example")], {"x": ([2], FLOAT)}, "y", domains={"org.example": 1})
    with pytest.raises(UnsupportedModelError, match=r"expected operators of the domains '', 'com.microsoft', got 'org.example'"):
        load(saved(model, tmp_path))


def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    model = make([node("StringNormalizer", "x", "y")], {"x": ([2], FLOAT)}, "y")
    with pytest.raises(UnsupportedModelError, match=r"got StringNormalizer \(node 'y_node'\); see docs/onnx-operators.md"):
        load(saved(model, tmp_path))


def test_a_missing_initialiser(tmp_path: Path) -> None:
    model = make([node("MatMul", "x w", "y")], {"x": (["batch", 4], FLOAT)}, "y")
    with pytest.raises(
        SourceError, match=r"node 'y_node' \(MatMul\): expected the value 'w' from an input, an initialiser or an earlier node"
    ):
        load(saved(model, tmp_path))


def test_an_initialiser_of_another_size_than_its_shape(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(random(4, 3), "w")
    weight.dims[1] = 5
    with pytest.raises(SourceError, match=r"initialiser 'w': expected 80 bytes for the shape \(4, 5\), got 48"):
        load(saved(_linear(weight), tmp_path))


def test_a_graph_without_inputs(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected a graph with inputs, got none"):
        load(saved(make([node("Neg", "w", "y")], {}, "y", {"w": random(2)}), tmp_path))


def test_text_is_refused(tmp_path: Path) -> None:
    model = make([node("Identity", "x", "y")], {"x": ([2], TensorProto.STRING)}, "y")
    with pytest.raises(UnsupportedModelError, match=r"input 'x': expected numbers, got STRING"):
        load(saved(model, tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.randn(2, 5), r"input 'x': expected the shape \['batch', 4\], got \[2, 5\]"),
        (torch.randn(2, 4, dtype=torch.float64), r"input 'x': expected torch.float32, got torch.float64"),
        ({"z": torch.randn(2, 4)}, r"expected the inputs x, got z"),
        ((torch.randn(2, 4),) * 2, r"expected 1 inputs \(x\), got 2"),
    ],
)
def test_example_inputs_that_do_not_fit(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        load(saved(_linear(), tmp_path), example_inputs=given)


def test_operands_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"node 'y_node' \(MatMul, opset 18\): expected operands that torch can compute with"):
        load(saved(_linear(random(5, 3)), tmp_path))


def test_a_name_that_python_does_not_allow(tmp_path: Path) -> None:
    model = make([node("Neg", "input.1", "y")], {"input.1": (["batch size", 4], FLOAT)}, "y")
    graph = load(saved(model, tmp_path), example_inputs={"input.1": torch.ones(2, 4)}).graph
    assert torch.equal(graph(input_1=torch.ones(3, 4)), -torch.ones(3, 4))
    assert list(graph.interface.symbols.values()) == ["batch_size"]


def test_half_precision_is_traced_in_float32(tmp_path: Path) -> None:
    weight = random(4, 3).astype(np.float16)
    model = make([node("MatMul", "x w", "y")], {"x": (["batch", 4], TensorProto.FLOAT16)}, "y", {"w": weight})
    graph = load(saved(model, tmp_path)).graph
    x = torch.randn(2, 4)
    assert torch.allclose(graph(x=x), x @ torch.from_numpy(weight.astype(np.float32)), atol=1e-6)
    assert str(graph.constants["w"].transforms[-1]) == "cast(fp32)"
