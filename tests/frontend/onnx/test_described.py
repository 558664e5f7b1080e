"""Files of our exporter come back with every format: what their nodes are described as is read, if it is what they compute."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")

import onnx
from onnx import NodeProto

import qcompile
from qcompile.compiled import CompiledModel

CLOSE = 1e-6
"""Of results, relative to the largest: the same weights, sums in the same order but for the bias."""
IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(3))


class Words(nn.Module):
    """A table and two linears; 96 columns are no multiple of 64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.up, self.down = nn.Embedding(50, 64), nn.Linear(64, 96), nn.Linear(96, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S, 32] of tokens [B, S]."""
        made: Tensor = self.down(torch.relu(self.up(self.table(ids))))
        return made


def words(target: str, **options: Any) -> CompiledModel:
    given = {"quantize_embedding": True, "engine": "torch_cpu" if target.startswith("cpu") else None, **options}
    return qcompile.compile(Words(), target, recipe="nearest", example_inputs=IDS, calibration=[IDS], **given)


def contents(compiled: CompiledModel) -> Counter[tuple[str, ...]]:
    """Format, part, shape and bytes of all that is packed."""
    packed = [(name, constant) for name, constant in compiled.graph.constants.items() if constant.format is not None]
    tensors = [(str(constant.format), name.rpartition(".")[2], constant.materialize().contiguous()) for name, constant in packed]
    return Counter((form, part, str(list(item.shape)), item.view(torch.uint8).numpy().tobytes().hex()) for form, part, item in tensors)


@pytest.mark.parametrize(("target", "profile", "options"), [
    ("cpu-int8", "portable", {}), ("cpu-int4", "ort", {}), ("cpu-int3", "ort", {}), ("cpu-int2", "portable", {}), ("cpu-nf4", "ort", {}),
    ("cpu-fp8", "portable", {}), ("cpu-mxint8", "portable", {}), ("cpu-mxint8", "ort", {}), ("cpu-mxfp4", "ort", {}),
    ("cpu-nvfp4", "portable", {}), ("cpu-w8a8", "ort", {}), ("cpu-w4a8", "portable", {}), ("cpu-int4", "portable", {"symmetric": False}),
    ("cpu-int4", "ort", {"symmetric": False, "group_size": -1}), ("cpu-int4", "ort", {"weight_format": "int4 g16 sym int8"}),
    ("cpu-int4", "portable", {"weight_format": "nf4 g16 sym int8/2"}), ("cpu-int4", "ort", {"weight_format": "int5 g16 asym bf16"}),
    ("cpu-int4", "portable", {"weight_format": "int6 channel sym fp32"}), ("cpu-int4", "ort", {"weight_format": "int7 g32 sym fp16"}),
    ("cpu-int4", "ort", {"weight_format": "int8 channel asym fp16"}), ("cpu-int4", "ort", {"weight_format": "int4 g16 min fp16"}),
    ("cpu-int4", "portable", {"weight_format": "int5 channel min bf16"}),
])  # fmt: skip
def test_every_format_comes_back(target: str, profile: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Codes, scales of both levels and zero points, byte for byte; nobody is told that anything is read as floats."""
    ours = words(target, **options)
    assert len({form for form, *_ in contents(ours)}) == 1
    path = ours.export_onnx(tmp_path / "m.onnx", profile=profile).path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    assert contents(back) == contents(ours)
    assert back.bits_per_weight == ours.bits_per_weight
    assert (back(ids=IDS) - ours(IDS)).abs().max() <= CLOSE * ours(IDS).abs().max()


def told(node: NodeProto, key: str, text: str) -> None:
    next(item for item in node.metadata_props if item.key == f"qcompile.{key}").value = text


def text_of(node: NodeProto, key: str) -> str:
    return next((item.value for item in node.metadata_props if item.key == f"qcompile.{key}"), "")


def other(node: NodeProto, nodes: list[NodeProto]) -> str:
    """The codes of another weight."""
    return next(text_of(item, "codes") for item in nodes if text_of(item, "codes") not in ("", text_of(node, "codes")))


LIES: dict[str, Callable[[NodeProto, list[NodeProto]], None]] = {
    r"described as fp4 g64 sym fp16, which stands for other numbers than": lambda node, _: told(node, "format", "fp4 g64 sym fp16"),
    r"expected a format like 'int4 g64 sym fp16', got 'mine'": lambda node, _: told(node, "format", "mine"),
    r"described as nf4 g64 sym fp16, and its codes are torch.uint8": lambda node, nodes: told(node, "codes", other(node, nodes)),
    r"and the file has no initializer for its scale": lambda node, _: told(node, "scale", "nothing"),
    r"its description has the layout 'sideways' of 64 columns": lambda node, _: told(node, "layout", "sideways"),
    r"described as nf4 g32 sym fp16, and its scale are torch.float16": lambda node, _: told(node, "format", "nf4 g32 sym fp16"),
    r"described as int4 g64 asym fp16, and the file has no init.* zero": lambda node, _: told(node, "format", "int4 g64 asym fp16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledModel, onnx.ModelProto]:
    ours = words("cpu-nf4", quantize_embedding=False)
    return ours, onnx.load(ours.export_onnx(tmp_path_factory.mktemp("words") / "m.onnx").path)


@pytest.mark.parametrize("message", LIES)
def test_a_description_that_is_not_true_is_not_believed(
    message: str, exported: tuple[CompiledModel, onnx.ModelProto], tmp_path: Path
) -> None:
    """The weight is then what the nodes compute, and a warning says why; the other keeps its format."""
    ours, written = exported
    model = onnx.ModelProto.FromString(written.SerializeToString())
    nodes = list(model.graph.node)
    node = next(node for node in nodes if text_of(node, "columns") == "64")
    LIES[message](node, nodes)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.warns(UserWarning, match=rf"quantized weights that are read as floats: .*{message}"):
        back = qcompile.compile(tmp_path / "m.onnx", "cpu-fp32", engine="torch_cpu")
    assert [row.format for row in back.coverage if row.operator == "quantized_linear"] == ["nf4 g64 sym fp16"]
    assert (back(ids=IDS) - ours(IDS)).abs().max() <= CLOSE * ours(IDS).abs().max()


@pytest.mark.parametrize(("profile", "operator"), [("portable", "DequantizeLinear"), ("ort", "MatMulNBits")])
def test_operands_are_believed_before_descriptions(profile: str, operator: str, tmp_path: Path) -> None:
    """Of a weight that has a format without being described, and is described as another one's codes."""
    ours = words("cpu-int4", group_size=32, quantize_embedding=False)
    path = ours.export_onnx(tmp_path / "m.onnx", profile=profile).path
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type == operator]
    assert len(nodes) == 2
    for node in nodes:
        told(node, "scale", text_of(nodes[0], "scale"))
        told(node, "columns", text_of(nodes[0], "columns"))
        told(node, "codes", text_of(nodes[0], "codes"))
    onnx.save(model, path)
    back = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    assert contents(back) == contents(ours)


def test_a_table_is_held_against_the_rows_that_its_nodes_give(tmp_path: Path) -> None:
    ours = words("cpu-nf4")
    path = ours.export_onnx(tmp_path / "m.onnx").path
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if text_of(node, "layout") == "lookup"]
    told(node, "format", "fp4 g64 sym fp16")
    onnx.save(model, path)
    with pytest.warns(UserWarning, match="described as fp4 g64 sym fp16, which stands for other numbers than its nodes compute"):
        back = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    assert "quantized_embedding" not in {row.operator for row in back.coverage}
    assert (back(ids=IDS) - ours(IDS)).abs().max() <= CLOSE * ours(IDS).abs().max()
