"""Batch norms go into what they follow, and say why where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.frontend.capture import capture_module
from qcompile.passes.fold_batch_norms import FoldBatchNorms
from tests.models import example_inputs, tiny
from tests.passes.helpers import assert_same_function, capture, names, run


def _trained(norm: nn.Module) -> nn.Module:
    """Statistics of their own, a negative gain and a dead channel among them."""
    generator = torch.Generator().manual_seed(3)
    size = norm.num_features
    norm.running_mean.copy_(torch.randn(size, generator=generator))
    norm.running_var.copy_(torch.rand(size, generator=generator) + 0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size, generator=generator))
        norm.weight[0] = 0.0
        norm.bias.copy_(torch.randn(size, generator=generator))
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_behind_a_convolution(bias: bool, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias, groups=groups), _trained(nn.BatchNorm2d(8)), nn.ReLU())
    graph = capture(model, torch.randn(2, 4, 6, 6))
    before = graph.clone()
    run(graph, FoldBatchNorms())
    assert names(graph) == ["aten.conv2d", "aten.relu"]
    assert_same_function(before, graph)


def test_behind_a_linear_and_without_a_gain() -> None:
    norm = nn.BatchNorm1d(8, affine=False)
    norm.running_mean.copy_(torch.arange(8.0))
    graph = capture(nn.Sequential(nn.Linear(4, 8), norm), torch.randn(3, 4))
    before = graph.clone()
    run(graph, FoldBatchNorms())
    assert names(graph) == ["aten.linear"]
    assert_same_function(before, graph)


def test_a_resnet_loses_all_of_them() -> None:
    graph = capture_module(tiny("resnet"), example_inputs("resnet"))
    before = graph.clone()
    assert "aten.batch_norm" in names(graph)
    run(graph, FoldBatchNorms())
    assert "aten.batch_norm" not in names(graph)
    assert_same_function(before, graph)


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y) + self.norm(torch.relu(x))


def test_what_others_read_is_left_alone_and_named() -> None:
    graph = capture(_Shared(), torch.randn(2, 3, 4, 4))
    ctx = run(graph, FoldBatchNorms())
    reasons = [reason for _, _, reason, _ in ctx.notes]
    assert reasons == [
        "conv2d is read by 2 nodes, expected by the batch norm alone",
        "it reads aten.relu, expected a convolution or a linear",
    ]
