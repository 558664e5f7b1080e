"""Sizes that vary stay so: through arithmetic on shapes, and under the names that the file gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from onnx import NodeProto, TensorProto

from qcompile.errors import TraceError
from qcompile.frontend import load
from tests.frontend.onnx.making import FLOAT, INT64, imported, make, node, random, saved, stock


def _heads() -> tuple[list[NodeProto], dict[str, object]]:
    """[B, S, 12] -> [B, 3, S, 4], as old exporters write it: sizes gathered, divided, concatenated."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s zero", "b"), node("Gather", "s one", "l"), node("Gather", "s two", "d"),
        node("Div", "d three", "h"), node("Unsqueeze", "b zero1", "b1"), node("Unsqueeze", "l zero1", "l1"),
        node("Unsqueeze", "h zero1", "h1"), node("Concat", "b1 l1 three1 h1", "t", axis=0), node("Reshape", "x t", "r"),
        node("Transpose", "r", "y", perm=[0, 2, 1, 3]),
    ]  # fmt: skip
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "zero1": [0], "three1": [3]}
    return nodes, {name: np.array(value) for name, value in numbers.items()}


def test_sizes_pass_through_arithmetic(tmp_path: Path) -> None:
    nodes, weights = _heads()
    path = saved(make(nodes, {"x": (["batch", "sequence", 12], FLOAT)}, "y", weights), tmp_path)
    graph = load(path).graph
    assert set(graph.interface.symbols.values()) == {"batch", "sequence"}
    for batch, length in ((1, 1), (2, 5), (7, 3)):
        x = torch.randn(batch, length, 12)
        assert torch.equal(graph(x=x), x.reshape(batch, length, 3, 4).transpose(1, 2))


def test_equal_names_are_one_dimension(tmp_path: Path) -> None:
    inputs = {"a": (["batch", "length"], FLOAT), "b": (["batch", "length"], FLOAT), "c": ([None, 3], FLOAT)}
    model = make([node("Add", "a b", "s"), node("MatMul", "c w", "t")], inputs, "s t", {"w": random(3, 2)})
    graph = load(saved(model, tmp_path)).graph
    a, b, _ = (item.meta["val"] for item in graph.placeholders)
    assert str(a.shape) == str(b.shape)
    assert sorted(graph.interface.symbols.values()) == ["batch", "c_0", "length"]
    result = graph(a=torch.ones(3, 4), b=torch.ones(3, 4), c=torch.ones(5, 3))
    assert list(result) == ["s", "t"], "several outputs by name"
    assert result["t"].shape == (5, 2)


def test_sums_of_names_are_related(tmp_path: Path) -> None:
    inputs = {"past": (["batch", "before", 2], FLOAT), "x": (["batch", "now", 2], FLOAT), "mask": (["batch", "before + now"], FLOAT)}
    nodes = [node("Concat", "past x", "all", axis=1), node("ReduceSum", "all a", "r", keepdims=0), node("Mul", "r mask", "y")]
    graph = load(saved(make(nodes, inputs, "y", {"a": np.array([2])}), tmp_path)).graph
    result = graph(past=torch.ones(3, 4, 2), x=torch.ones(3, 5, 2), mask=torch.ones(3, 9))
    assert torch.equal(result, torch.full((3, 9), 2.0))


def test_a_bound_is_found_and_names_stay_shared(tmp_path: Path) -> None:
    """A table of 16 positions, cut to the length: the trace finds the longest, and both inputs keep one symbol per name."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s one", "l"), node("Slice", "table zero l zero", "p"), node("Add", "x p", "a"),
        node("Unsqueeze", "mask two", "m"), node("Mul", "a m", "y"),
    ]  # fmt: skip
    weights = {"table": random(16, 4), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    inputs = {"x": (["batch", "length", 4], FLOAT), "mask": (["batch", "length"], FLOAT)}
    graph = load(saved(make(nodes, inputs, "y", weights), tmp_path)).graph
    x, mask = (item.meta["val"] for item in graph.placeholders)
    assert list(map(str, x.shape[:2])) == list(map(str, mask.shape))
    assert sorted(graph.interface.symbols.values()) == ["batch", "length"]
    for length in (1, 16):
        value = torch.randn(3, length, 4)
        assert torch.allclose(graph(x=value, mask=torch.full((3, length), 2.0)), (value + torch.from_numpy(random(16, 4))[:length]) * 2)


@pytest.mark.parametrize("length", [3, 8])
def test_ranges_and_masks_follow_the_length(length: int, tmp_path: Path) -> None:
    """A causal mask from a range of the length, and -1 replaced in a shape to expand to, as exporters write them."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s one", "l"), node("Range", "zero l one", "p"), node("Unsqueeze", "p a1", "row"),
        node("LessOrEqual", "p row", "keep"), node("Unsqueeze", "l a0", "l1"), node("Concat", "m1 l1 l1", "wide", axis=0),
        node("ConstantOfShape", "three", "ones"), node("Mul", "ones m1", "minus"), node("Equal", "wide minus", "free"),
        node("Where", "free ones wide", "to"), node("Expand", "keep to", "e"), node("Where", "e zerof low", "y"),
    ]  # fmt: skip
    numbers = {"zero": 0, "one": 1, "a0": [0], "a1": [1], "three": [3], "m1": [-1]}
    weights: dict[str, object] = {name: np.array(value) for name, value in numbers.items()}
    weights |= {"zerof": np.float32(0), "low": np.float32(np.finfo(np.float32).min)}
    nodes[7].attribute.append(_value(1))
    path = saved(make(nodes, {"x": (["batch", "length"], INT64)}, "y", weights), tmp_path)
    inputs = {"x": torch.zeros(2, length, dtype=torch.int64)}
    assert torch.equal(imported(path, inputs)[0], stock(path, inputs)[0])


def _value(number: int) -> object:
    from onnx import helper

    return helper.make_attribute("value", helper.make_tensor("value", TensorProto.INT64, [1], [number]))


def test_images_of_any_size(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c", auto_pad="SAME_UPPER", strides=[2, 2]), node("Resize", "c - s", "u", mode="nearest"),
        node("GlobalAveragePool", "u", "y"),
    ]  # fmt: skip
    weights = {"w": random(4, 3, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}
    path = saved(make(nodes, {"x": (["batch", 3, "height", "width"], FLOAT)}, "y", weights), tmp_path)
    graph = load(path).graph
    for size in ((2, 3, 9, 16), (1, 3, 32, 31)):
        x = torch.randn(size)
        assert torch.allclose(graph(x=x), stock(path, {"x": x})[0], atol=1e-5)


def test_a_dimension_that_the_model_fixes_is_named(tmp_path: Path) -> None:
    model = make([node("Reshape", "x t", "y")], {"x": (["batch", 4], FLOAT)}, "y", {"t": np.array([2, 2, 2])})
    with pytest.raises(TraceError, match=r"model.onnx: expected dimension 0 of x to vary freely, but the model fixed it to 2"):
        load(saved(model, tmp_path))
    fixed = load(saved(model, tmp_path), dynamic_shapes={}).graph
    assert fixed(x=torch.ones(2, 4)).shape == (2, 2, 2)


def test_a_scalar_is_a_python_number(tmp_path: Path) -> None:
    nodes = [
        node("Pow", "x two", "q"),
        node("ReduceMean", "q a", "m"),
        node("Add", "m eps", "v"),
        node("Sqrt", "v", "r"),
        node("Div", "x r", "y"),
    ]
    weights = {"two": np.float32(2), "a": np.array([-1]), "eps": np.float32(1e-5)}
    graph = load(saved(make(nodes, {"x": (["batch", 8], FLOAT)}, "y", weights), tmp_path)).graph
    assert graph.constants == {}
    assert "aten.pow.Tensor_Scalar(%x, exponent=2.0)" in graph.text()
    assert "other=1e-05" in graph.text()
