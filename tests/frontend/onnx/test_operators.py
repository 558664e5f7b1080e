"""Operators by version, functions, branches, and the domain com.microsoft against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")

from onnx import NodeProto, TensorProto, helper, numpy_helper

from qcompile.errors import UnsupportedModelError
from qcompile.frontend import load
from tests.frontend.onnx.making import FLOAT, INT64, imported, make, node, random, saved, stock

X = torch.from_numpy(random(2, 3, 4, 5))


def _agree(path: Path, inputs: dict[str, Tensor], atol: float = 1e-5) -> None:
    for ours, theirs in zip(imported(path, inputs), stock(path, inputs), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours.double(), theirs.double(), atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("opset", "nodes", "weights"),
    [
        (12, [node("Softmax", "x", "y")], {}),  # over all axes from 1 on
        (13, [node("Softmax", "x", "y")], {}),  # over the last axis
        (12, [node("Softmax", "x", "y", axis=2)], {}),
        (10, [node("Clip", "x", "y", min=-0.5, max=0.25)], {}),
        (13, [node("Clip", "x low -", "y")], {"low": np.float32(-0.5)}),
        (12, [node("Unsqueeze", "x", "u", axes=[0, 3]), node("Squeeze", "u", "y", axes=[0])], {}),
        (13, [node("Unsqueeze", "x a", "u"), node("Squeeze", "u a", "y")], {"a": np.array([0, 3])}),
        (11, [node("ReduceSum", "x", "y", axes=[1, -1], keepdims=0)], {}),
        (13, [node("ReduceSum", "x a", "y", keepdims=0)], {"a": np.array([1, -1])}),
        (17, [node("ReduceMean", "x", "y", axes=[-1])], {}),
        (18, [node("ReduceMean", "x a", "y")], {"a": np.array([-1])}),
        (9, [node("Slice", "x", "y", starts=[1, -2], ends=[100, -1], axes=[1, 3])], {}),
        (13, [node("Slice", "x s e a t", "y")],
         {"s": np.array([-1, 4]), "e": np.array([-100, 0]), "a": np.array([1, 3]), "t": np.array([-1, -2])}),
        (9, [node("Pad", "x", "y", pads=[0, 0, 1, 2, 0, 0, 3, 0], value=1.5)], {}),
        (13, [node("Pad", "x p", "y", mode="reflect")], {"p": np.array([0, 0, 1, 2, 0, 0, 3, 0])}),
        (11, [node("Split", "x", "a b", axis=3, split=[2, 3]), node("Concat", "b a", "y", axis=3)], {}),
        (18, [node("Split", "x", "a b c", axis=3, num_outputs=3), node("Concat", "c b a", "y", axis=3)], {}),
        (9, [node("Upsample", "x s", "y", mode="nearest")], {"s": np.array([1, 1, 2, 3], np.float32)}),
        (10, [node("Resize", "x s", "y", mode="linear")], {"s": np.array([1, 1, 2, 1.5], np.float32)}),
        (13, [node("Resize", "x - s", "y", mode="linear")], {"s": np.array([1, 1, 2, 2], np.float32)}),
        (13, [node("Resize", "x - z", "y", mode="cubic")], {"z": np.array([1, 1, 1.75, 0.6], np.float32)}),
        (9, [node("TopK", "x", "y i", axis=3, k=2)], {}),
        (11, [node("TopK", "x k", "y i", axis=2, largest=0)], {"k": np.array([2])}),
        (18, [node("Dropout", "x", "y")], {}),
        (9, [node("BatchNormalization", "x s b m v", "y")],
         {"s": random(3), "b": random(3, seed=1), "m": random(3, seed=2), "v": np.abs(random(3, seed=3))}),
        (18, [node("LayerNormalization", "x s b", "y", axis=-1, epsilon=1e-3)], {"s": random(5), "b": random(5, seed=1)}),
        (18, [node("Conv", "x w b", "y", auto_pad="SAME_LOWER", strides=[2, 2])], {"w": random(6, 3, 3, 2), "b": random(6)}),
        (18, [node("ConvTranspose", "x w", "y", strides=[2, 2], pads=[0, 1, 1, 0], output_padding=[1, 0])], {"w": random(3, 2, 3, 3)}),
        (18, [node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1, pads=[1, 0, 0, 1])], {}),
        (18, [node("AveragePool", "x", "y", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1])], {}),
        (18, [node("LRN", "x", "y", size=3)], {}),
        (18, [node("Gemm", "f w c", "y", alpha=0.5, beta=2.0, transB=1)], {"w": random(7, 60), "c": random(7)}),
        (18, [node("Mod", "x d", "y", fmod=1)], {"d": random(1)}),
        (18, [node("PRelu", "x s", "y")], {"s": random(3, 1, 1)}),
        (18, [node("LpNormalization", "x", "y", axis=1, p=1)], {}),
        (18, [node("InstanceNormalization", "x s b", "y")], {"s": random(3), "b": random(3, seed=1)}),
        (18, [node("DepthToSpace", "d", "y", blocksize=2, mode="CRD")], {}),
        (18, [node("CumSum", "x a", "y", exclusive=1, reverse=1)], {"a": np.array(2)}),
        (18, [node("Trilu", "x", "y", upper=0)], {}),
        (18, [node("Einsum", "x w", "y", equation="bchw,wk->bchk")], {"w": random(5, 3)}),
    ],
)  # fmt: skip
def test_versions_of_operators(opset: int, nodes: list[NodeProto], weights: dict[str, Any], tmp_path: Path) -> None:
    first: list[NodeProto] = []
    read = {name for item in nodes for name in item.input}
    if "f" in read:
        first = [node("Flatten", "x", "f")]
    if "d" in read and "d" not in weights:
        first = [node("Concat", "x x x x", "c4", axis=1), node("Slice", "c4 z e o", "d")]
        weights = weights | {"z": np.array([0]), "e": np.array([4]), "o": np.array([3])}
    model = make([*first, *nodes], {"x": (["batch", 3, 4, 5], FLOAT)}, "y", weights, opset=opset)
    _agree(saved(model, tmp_path), {"x": X})


def _microsoft(operator: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    made = node(operator, inputs, outputs, **attributes)
    made.domain = "com.microsoft"
    return made


def _rotary() -> dict[str, Any]:
    angle = np.arange(16)[:, None] * np.array([[1.0, 0.1]])
    return {"p": np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]), "c": np.cos(angle).astype(np.float32), "s": np.sin(angle).astype(np.float32)}


_CODES = np.random.default_rng(1).integers(0, 256, (6, 2, 16), dtype=np.uint8)


@pytest.mark.parametrize(
    ("made", "weights"),
    [
        (_microsoft("FastGelu", "x b", "y"), {"b": random(40)}),
        (_microsoft("BiasGelu", "x b", "y"), {"b": random(40)}),
        (_microsoft("QuickGelu", "x", "y", alpha=1.5), {}),
        (_microsoft("Gelu", "x", "y"), {}),
        (_microsoft("FusedMatMul", "x w", "y", alpha=0.25, transB=1), {"w": random(6, 40)}),
        (_microsoft("SkipLayerNormalization", "x k g b h", "y", epsilon=1e-5),
         {"k": random(2, 5, 40), "g": random(40), "b": random(40, seed=1), "h": random(40, seed=2)}),
        (_microsoft("SkipSimplifiedLayerNormalization", "x k g", "y - - t"), {"k": random(2, 5, 40), "g": random(40)}),
        (node("SimplifiedLayerNormalization", "x g", "y", axis=-1, epsilon=1e-5), {"g": random(40)}),
        (_microsoft("MatMulNBits", "x q z", "y", K=40, N=6, bits=4, block_size=32),
         {"q": _CODES, "z": np.abs(random(12))}),
        (_microsoft("MatMulNBits", "x q z o", "y", K=40, N=6, bits=4, block_size=32),
         {"q": _CODES, "z": np.abs(random(12)), "o": np.random.default_rng(2).integers(0, 256, 6, dtype=np.uint8)}),
        (_microsoft("RotaryEmbedding", "x p c s", "y", num_heads=10), _rotary()),
        (_microsoft("RotaryEmbedding", "x p c s", "y", num_heads=10, interleaved=1), _rotary()),
    ],
)  # fmt: skip
def test_operators_of_onnxruntime(made: NodeProto, weights: dict[str, Any], tmp_path: Path) -> None:
    made.output[:] = ["" if name == "-" else name for name in made.output]
    outputs = " ".join(name for name in made.output if name)
    path = saved(make([made], {"x": ([2, 5, 40], FLOAT)}, outputs, weights, opset=17), tmp_path)
    x = torch.from_numpy(random(2, 5, 40, seed=7))
    # int8 inside of onnxruntime's own product of 4-bit weights, where we compute in float32.
    _agree(path, {"x": x}, atol=2e-4)


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8])
def test_weights_in_blocks(kind: int, tmp_path: Path) -> None:
    signed = kind in (TensorProto.INT4, TensorProto.INT8)
    codes = np.random.default_rng(0).integers(-8 if signed else 0, 8 if signed else 16, (8, 6))
    weights = {
        "q": helper.make_tensor("q", kind, [8, 6], codes.reshape(-1).tolist()),
        "s": np.abs(random(2, 6)),
        "z": helper.make_tensor("z", kind, [2, 6], [1] * 12),
    }
    nodes = [node("DequantizeLinear", "q s z", "w", axis=0, block_size=4), node("MatMul", "x w", "y")]
    _agree(saved(make(nodes, {"x": (["batch", 8], FLOAT)}, "y", weights, opset=21), tmp_path), {"x": torch.randn(3, 8)})


def test_a_zero_point_of_4_bits_that_is_computed(tmp_path: Path) -> None:
    """Torch knows it as int8; saturation is to 4 bits."""
    nodes = [
        node("Cast", "z", "c", to=TensorProto.INT4),
        node("Reshape", "c n", "r"),
        node("QuantizeLinear", "x s r", "q"),
        node("Cast", "q", "y", to=FLOAT),
    ]
    inputs = {"x": (["batch", 8], FLOAT), "z": ([1], TensorProto.INT32)}
    path = saved(make(nodes, inputs, "y", {"s": np.float32(0.1), "n": np.array([], np.int64)}, opset=21), tmp_path)
    (y,) = imported(path, {"x": torch.linspace(-9, 9, 24).reshape(3, 8), "z": torch.tensor([2], dtype=torch.int32)})
    assert (y.min(), y.max()) == (-8, 7)


@pytest.mark.parametrize("taken", [0, 1])
def test_branches_that_use_one_name(taken: int, tmp_path: Path) -> None:
    large = [random(80, 80, seed=seed) for seed in range(2)]
    parts = [
        helper.make_graph([node("MatMul", "x same", "out")], f"branch{index}", [], [helper.make_empty_tensor_value_info("out")],
                          [numpy_helper.from_array(large[index], "same")])
        for index in range(2)
    ]  # fmt: skip
    both = [
        node("If", "yes", "a", then_branch=parts[taken], else_branch=parts[1 - taken]),
        node("If", "no", "b", then_branch=parts[taken], else_branch=parts[1 - taken]),
    ]
    model = make(both, {"x": (["batch", 80], FLOAT)}, "a b", {"yes": np.array(True), "no": np.array(False)})
    graph = load(saved(model, tmp_path)).graph
    keys = [constant.key for constant in graph.constants.values()]
    assert len(set(keys)) == 2, "equal keys mean equal tensors"
    x = torch.randn(2, 80)
    result = graph(x=x)
    assert torch.allclose(result["a"], x @ torch.from_numpy(large[taken]), atol=1e-4)
    assert torch.allclose(result["b"], x @ torch.from_numpy(large[1 - taken]), atol=1e-4)


def test_integer_products(tmp_path: Path) -> None:
    weights = {
        "w": np.random.default_rng(0).integers(-127, 128, (8, 6), dtype=np.int8), "zw": np.int8(0), "s": np.float32(0.01),
    }  # fmt: skip
    nodes = [
        node("DynamicQuantizeLinear", "x", "q sx zx"), node("MatMulInteger", "q w zx zw", "i"), node("Cast", "i", "f", to=FLOAT),
        node("Mul", "sx s", "r"), node("Mul", "f r", "y"),
    ]  # fmt: skip
    _agree(saved(make(nodes, {"x": (["batch", 8], FLOAT)}, "y", weights), tmp_path), {"x": torch.randn(3, 8)})


def _function(version: int) -> Any:
    # A constant of the function itself, an attribute of it with a default, and a call of another function.
    nodes = [
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32(0.5))),
        helper.make_node("LeakyRelu", ["a"], ["r"]),
        helper.make_node("Mul", ["r", "half"], ["b"]),
    ]
    nodes[1].attribute.add(name="alpha", ref_attr_name="slope", type=1)
    slope = helper.make_attribute("slope", 0.25)
    return helper.make_function(
        "org.example", "HalfRelu", ["a"], ["b"], nodes, [helper.make_opsetid("", version)], attribute_protos=[slope]
    )


@pytest.mark.parametrize(("attributes", "slope"), [({}, 0.25), ({"slope": 0.75}, 0.75)])
def test_local_functions_are_put_in_place(attributes: dict[str, float], slope: float, tmp_path: Path) -> None:
    call = helper.make_node("HalfRelu", ["x"], ["y"], domain="org.example", **attributes)
    model = make([call], {"x": (["batch", 4], FLOAT)}, "y", functions=[_function(18)], domains={"org.example": 1})
    x = torch.randn(3, 4)
    (y,) = imported(saved(model, tmp_path), {"x": x})
    assert torch.allclose(y, torch.nn.functional.leaky_relu(x, slope) * 0.5)


def test_operators_defined_by_others_keep_their_defaults(tmp_path: Path) -> None:
    """MeanVarianceNormalization has no rule: its definition reads an attribute whose default only the schema tells."""
    model = make([node("MeanVarianceNormalization", "x", "y")], {"x": (["batch", 3, 4, 5], FLOAT)}, "y", opset=13)
    (y,) = imported(saved(model, tmp_path), {"x": X})
    centred = X - X.mean((0, 2, 3), keepdim=True)
    assert torch.allclose(y, centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt(), atol=1e-4)


def _branches(condition: list[NodeProto], weights: dict[str, Any]) -> Any:
    parts = [
        helper.make_graph([node(operator, "x same", f"{operator}_y")], operator, [], [helper.make_empty_tensor_value_info(f"{operator}_y")],
                          [numpy_helper.from_array(np.float32(number), "same")])
        for operator, number in (("Add", 1.0), ("Sub", 2.0))
    ]  # fmt: skip
    branch = node("If", "c", "y", then_branch=parts[0], else_branch=parts[1])
    return make([*condition, branch], {"x": (["batch", 4], FLOAT)}, "y", weights)


@pytest.mark.parametrize(("rank", "change"), [(2, 1.0), (3, -2.0)])
def test_a_branch_whose_condition_is_known(rank: int, change: float, tmp_path: Path) -> None:
    condition = [node("Shape", "x", "s"), node("Size", "s", "n"), node("Equal", "n r", "c")]
    x = torch.randn(3, 4)
    (y,) = imported(saved(_branches(condition, {"r": np.array(rank)}), tmp_path), {"x": x})
    assert torch.equal(y, x + change)


def test_a_branch_on_values_is_refused_by_name(tmp_path: Path) -> None:
    condition = [node("ReduceSum", "x", "t", keepdims=0), node("Greater", "t r", "c")]
    path = saved(_branches(condition, {"r": np.float32(0)}), tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"node 'y_node' \(If, opset 18\): expected the condition of a branch \(c\) to be a constant"
    ):
        load(path)


def test_an_attribute_that_no_rule_knows_is_refused(tmp_path: Path) -> None:
    path = saved(make([node("Relu", "x", "y", leak=0.1)], {"x": ([2], FLOAT)}, "y"), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"node 'y_node' \(Relu, opset 18\): expected nothing beyond .* got attribute leak"):
        load(path)


def test_a_shape_that_is_known_at_run_time_only(tmp_path: Path) -> None:
    path = saved(make([node("Reshape", "x s", "y")], {"x": ([4], FLOAT), "s": ([2], INT64)}, "y"), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"expected the shape \(s\) to be a constant or computed from shapes"):
        load(path)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_dynamic_quantization_of_one_value(value: float, tmp_path: Path) -> None:
    model = make([node("DynamicQuantizeLinear", "x", "q s z")], {"x": (["batch", 4], FLOAT)}, "q s z")
    path, x = saved(model, tmp_path), torch.full((2, 4), value)
    for ours, theirs in zip(imported(path, {"x": x}), stock(path, {"x": x}), strict=True):
        assert torch.allclose(ours.float(), theirs.float())
