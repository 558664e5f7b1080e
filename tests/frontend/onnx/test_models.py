"""Whole small models as torch.onnx writes them: the same numbers as onnxruntime, and then compiled."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import qcompile
from qcompile.frontend import load
from tests.frontend.onnx.making import imported, stock


class Encoder(nn.Module):
    """One layer as in BERT, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, S, 5] of ids and mask [B, S]."""
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))[None]
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None, :].bool())
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        logits: Tensor = self.head(self.second(x + self.down(F.gelu(self.up(x)))))
        return logits


class Convolutions(nn.Module):
    """As in a small mobile net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise, self.head = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 3, H, W]."""
        x = F.hardswish(self.depthwise(F.relu6(self.norm(self.stem(x)))))
        x = F.max_pool2d(F.silu(self.pointwise(x)), 3, 2, 1)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def _ids(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask}


@pytest.fixture(scope="module", params=["traced", "scripted"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    torch.manual_seed(0)
    inputs, names = _ids(2, 9), ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "traced":
            batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=64)
            shapes = ({0: batch, 1: sequence},) * 2
            torch.onnx.export(
                Encoder().eval(), tuple(inputs.values()), path, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False
            )
        else:
            axes = {name: {0: "batch", 1: "sequence"} for name in names}
            torch.onnx.export(
                Encoder().eval(), tuple(inputs.values()), str(path), dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes
            )
    return path


def test_encoder(encoder: Path) -> None:
    graph = load(encoder).graph
    assert set(graph.interface.symbols.values()) == {"batch", "sequence"}
    for batch, length in ((2, 9), (1, 1), (3, 30)):
        inputs = _ids(batch, length)
        assert torch.allclose(graph(**inputs), stock(encoder, inputs)[0], atol=1e-5)
    assert len(graph.calls(torch.ops.aten.linear.default)) == 5
    assert "words.weight" in graph.constants


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-w8a8"])
def test_encoder_compiled(encoder: Path, target: str) -> None:
    compiled, inputs = qcompile.compile(encoder, target=target), _ids(2, 9)
    exact = stock(encoder, inputs)[0]
    assert (compiled(**inputs) - exact).abs().max() < 0.03 * exact.abs().max(), "one layer at 8 bits"
    formats = [row.format for row in compiled.coverage if "linear" in row.operator]
    assert len(formats) == 5
    assert sum("int8" in name for name in formats) >= 4


@pytest.mark.parametrize("opset", [13, 18])
def test_convolutions(opset: int, tmp_path: Path) -> None:
    path, module, x = tmp_path / "convolutions.onnx", Convolutions().eval(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), str(path), dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    images = torch.randn(3, 3, 32, 32)
    exact = stock(path, {"x": images})[0]
    assert torch.allclose(imported(path, {"x": images})[0], exact, atol=1e-5)
    for target, options in (("cpu-int8", {}), ("cpu-w8a8", {"calibration": [{"x": torch.randn(4, 3, 32, 32)} for _ in range(2)]})):
        compiled = qcompile.compile(path, target=target, **options)
        assert (compiled(x=images) - exact).abs().max() < 0.05 * exact.abs().max(), target
