"""Weight formats through compile, save and load: the artifact computes with the weights that the format defines."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.quant.format import parse_format
from qcompile.quant.reference import quantize, restore, stored_bits
from qcompile.quant.scheme import QuantScheme

FORMATS = (
    "int3 g64 sym fp16", "int2 g64 asym fp16", "int5 g32 asym bf16", "int4 g36 sym int8", "int4 g16 asym int8/2", "nf4 g64 sym fp16",
    "fp8 channel sym fp32", "fp4 g32 sym e8m0", "int8 g32 sym e8m0", "fp4 g16 sym e4m3", "int4 g32 min fp16",
)  # fmt: skip


class Mlp(nn.Module):
    """Two linears, one with columns that no group size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(72, 100), nn.Linear(100, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def rounded(module: Mlp, text: str) -> Mlp:
    """The module with its weights as the format has them."""
    form = parse_format(text)
    for linear in (module.up, module.down):
        linear.weight.data = restore(quantize(linear.weight.data, form), form, linear.in_features)
    return module


@pytest.mark.parametrize("arch", ["cpu", "reference"])
@pytest.mark.parametrize("text", FORMATS)
def test_an_artifact_computes_with_the_weights_of_its_format(text: str, arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Mlp(), torch.randn(5, 72)
    asked = QuantScheme("int8", weight=parse_format(text))
    compiled = qcompile.compile(module, f"{arch}-int8", scheme=asked, example_inputs=(x,), recipe="nearest")
    bits = sum(stored_bits(parse_format(text), linear.out_features, linear.in_features) for linear in (module.up, module.down))
    assert compiled.bits_per_weight == bits / (72 * 100 + 100 * 16)
    expected = rounded(copy.deepcopy(module), text)(x)
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    compiled.save(tmp_path / "out")
    torch.testing.assert_close(qcompile.load(tmp_path / "out")(x), expected, atol=1e-5, rtol=1e-5)
