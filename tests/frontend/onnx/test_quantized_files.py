"""Quantized files of our own exporter and of onnxruntime's quantizers: formats come back, and the numbers that onnxruntime computes."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.frontend import load
from qcompile.quant.format import parse_format
from qcompile.quant.scheme import QuantScheme
from tests.frontend.onnx.making import make, node, same, saved, stock
from tests.models import example_inputs, tiny


def outputs(result: Any) -> Tensor:
    """The first of what a model gives."""
    return result if isinstance(result, Tensor) else next(iter(result.values()))


def formats(compiled: CompiledModel) -> Counter[tuple[str, str]]:
    """Operator and format of each linear and convolution; a group that is a row is one scale a channel."""
    rows = [row for row in compiled.coverage if "linear" in row.operator or "conv" in row.operator]
    return Counter((row.operator, row.format.replace("g64", "channel")) for row in rows)


@pytest.mark.parametrize(("family", "target", "profile"), [
    ("bert", "cpu-int4", "portable"), ("bert", "cpu-int4", "ort"), ("bert", "cpu-w8a8", "ort"), ("resnet", "cpu-int8", "portable"),
    ("resnet", "cpu-w8a8", "portable"), ("resnet", "cpu-w8a8", "ort"),
])  # fmt: skip
def test_our_own_files_come_back_as_they_went(family: str, target: str, profile: str, tmp_path: Path) -> None:
    inputs = example_inputs(family)
    ours = qcompile.compile(tiny(family), target, recipe="nearest", example_inputs=inputs, calibration=[inputs], engine="torch_cpu")
    path = Path(ours.export_onnx(tmp_path / "m.onnx", profile=profile).path)
    back = qcompile.compile(path, target, recipe="nearest", example_inputs=inputs, dynamic_shapes={}, engine="torch_cpu")
    assert formats(back) == formats(ours)
    assert back.bits_per_weight == ours.bits_per_weight
    assert same(outputs(back(**inputs)), outputs(ours(**inputs)), 1e-6)
    assert same(outputs(back(**inputs)), stock(path, inputs)[0])


class Small(nn.Module):
    """Convolutions with a residual sum, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Linear(8, 64)
        self.middle, self.last = nn.Linear(64, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 3, H, W]."""
        x = torch.relu(self.stem(x))
        x = torch.relu(self.depthwise(x)) + x
        logits: Tensor = self.last(torch.relu(self.middle(torch.relu(self.head(x.mean((2, 3)))))))
        return logits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch"}}
        torch.onnx.export(Small().eval(), (IMAGES["x"],), str(path), dynamo=False, opset_version=21, input_names=["x"], dynamic_axes=axes)
    return path


IMAGES = {"x": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(("form", "bits", "symmetric"), [("QDQ", 4, True), ("QOperator", 4, False), ("QOperator", 8, True)])
def test_files_of_the_block_quantizer(small: Path, form: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    utils = pytest.importorskip("onnxruntime.quantization.quant_utils")
    model = onnx.load(small)
    for item in [item for item in model.graph.node if item.op_type == "Gemm"]:  # the quantizer knows MatMul alone
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == item.input[1])
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).T.copy(), weight.name))
        index = list(model.graph.node).index(item)
        sums = helper.make_node("Add", [f"{item.name}.product", item.input[2]], item.output, name=f"{item.name}.sum")
        model.graph.node.insert(index, helper.make_node("MatMul", item.input[:2], [f"{item.name}.product"], name=f"{item.name}.product"))
        model.graph.node.insert(index + 1, sums)
        model.graph.node.remove(item)
    made = quantizer.MatMulNBitsQuantizer(
        model, bits=bits, block_size=32, is_symmetric=symmetric, accuracy_level=1, quant_format=utils.QuantFormat[form]
    )
    made.process()
    path = saved(made.model.model, tmp_path)
    compiled = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    sizes = {"g32 ": 2, "channel ": 1}  # one has 8 columns, which are one block
    linears = [row.format for row in compiled.coverage if row.operator == "quantized_linear"]
    assert Counter(linears) == {f"int{bits} {size}{'sym' if symmetric else 'asym'} fp32": count for size, count in sizes.items()}
    assert same(compiled(**IMAGES), stock(path, IMAGES)[0])


class Images:
    """What `quantize_static` measures ranges on."""

    def __init__(self) -> None:
        self.left = [{"x": IMAGES["x"].numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        """One batch, then nothing."""
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("per_channel", [True, False])
def test_files_of_the_static_quantizer(small: Path, per_channel: bool, tmp_path: Path) -> None:
    """Rounded everywhere, in front of sums too; a value on the border between two codes may fall to either side."""
    tools = pytest.importorskip("onnxruntime.quantization")
    path = tmp_path / "static.onnx"
    kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8, "quant_format": tools.QuantFormat.QDQ}
    tools.quantize_static(small, path, Images(), per_channel=per_channel, **kinds)
    compiled = qcompile.compile(path, "cpu-w8a8", engine="torch_cpu")
    assert formats(compiled) == {("integer_conv2d", "int8 channel sym fp32"): 2, ("integer_linear", "int8 channel sym fp32"): 3}
    assert same(compiled(**IMAGES), stock(path, IMAGES)[0], 0.02)


def test_files_of_the_dynamic_quantizer(small: Path, tmp_path: Path) -> None:
    tools = pytest.importorskip("onnxruntime.quantization")
    path = tmp_path / "dynamic.onnx"
    tools.quantize_dynamic(small, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=tools.QuantType.QInt8)
    compiled = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    assert formats(compiled)["integer_linear", "int8 channel sym fp32"] == 3
    assert same(compiled(**IMAGES), stock(path, IMAGES)[0])


@pytest.mark.parametrize("form", ["int3 g64 sym fp16", "int5 g32 asym bf16", "int6 g32 sym fp16", "int7 g64 asym fp16"])
def test_our_own_words_of_64_bits_come_back_as_numbers(form: str, tmp_path: Path) -> None:
    """Codes that no byte holds whole are taken apart from numbers without a sign; folded, nothing of that is left in the graph.

    Nodes that tell what they are come back with their format (`test_described.py`).
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(72, 100), nn.ReLU(), nn.Linear(100, 16))
    x = torch.randn(5, 72)
    scheme = QuantScheme("int8", weight=parse_format(form))
    compiled = qcompile.compile(module, "cpu-int8", scheme=scheme, example_inputs=(x,), recipe="nearest", engine="torch_cpu")
    written = compiled.export_onnx(tmp_path / "m.onnx", opset=21)
    model = onnx.load(written.path)
    for item in model.graph.node:
        del item.metadata_props[:]
    graph = qcompile.compile(saved(model, tmp_path), "cpu-fp32", engine="torch_cpu").graph
    assert same(graph.run([x])[0], compiled(x))
    assert {str(node.target) for node in graph.nodes if node.op == "call_function"} <= {
        "aten.linear.default",
        "aten.add.Tensor",
        "aten.relu.default",
    }


def test_shifts_of_words_without_a_sign(tmp_path: Path) -> None:
    """As numpy does them, the highest bit included."""
    words = np.array([0, 1, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF], np.uint64)[:, None]
    places = np.array([0, 1, 8, 33, 63], np.uint64)
    nodes = [
        node("BitShift", "x p", "right", direction="RIGHT"), node("BitShift", "x p", "left", direction="LEFT"),
        node("Sub", "x p", "less"), node("Less", "x p", "below"), node("Max", "x p", "most"),
    ]  # fmt: skip
    inputs = {"x": ([5, 1], TensorProto.UINT64), "p": ([5], TensorProto.UINT64)}
    graph = load(saved(make(nodes, inputs, "right left less below most"), tmp_path)).graph
    found = graph(x=torch.from_numpy(words), p=torch.from_numpy(places))
    expected = {
        "right": words >> places, "left": words << places, "less": words - places, "below": words < places,
        "most": np.maximum(words, places),
    }  # fmt: skip
    assert all(np.array_equal(found[name].numpy(), value) for name, value in expected.items())
