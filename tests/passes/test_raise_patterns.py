"""raise-patterns and fuse-residual-norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.ir.graph import Graph
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from tests.passes.helpers import Gated, RmsNorm, assert_same_function, capture, names, run


def raised(module: nn.Module, *inputs: Tensor) -> Graph:
    """Capture and raise, checking that the function stayed."""
    graph = capture(module, *inputs)
    before = graph.clone()
    run(graph, Canonicalize(), RaisePatterns(), RemoveDeadCode())
    assert_same_function(before, graph)
    return graph


@pytest.mark.parametrize("offset", [False, True])
def test_rms_norm_with_either_gain(offset: bool) -> None:
    graph = raised(RmsNorm(16, offset), torch.randn(2, 5, 16))
    assert names(graph) == ["rms_norm"]
    (norm,) = graph.calls(torch.ops.qcompile.rms_norm.default)
    assert norm.args[2:] == (1e-5, 1.0 if offset else 0.0)


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("gain", [True, False])
def test_the_norm_of_torch_is_raised_too(eps: float | None, gain: bool) -> None:
    graph = raised(nn.RMSNorm(16, eps=eps, elementwise_affine=gain), torch.randn(2, 5, 16))
    assert names(graph) == ["rms_norm"]
    (norm,) = graph.calls(torch.ops.qcompile.rms_norm.default)
    assert (norm.args[1] is not None) == gain
    assert norm.args[2:] == (eps or torch.finfo(torch.float32).eps, 0.0)


def test_a_norm_over_another_axis_is_left_alone() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)

    assert "rms_norm" not in names(raised(Wrong(), torch.randn(2, 5, 16)))


class Rotary(nn.Module):
    """Tables from positions and frequencies, then the rotation, as Hugging Face models write them."""

    def __init__(self, size: int, scaling: float, product: str) -> None:
        super().__init__()
        self.product = product
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size))
        self.scaling = scaling

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.product == "matmul":
            frequency = self.inv_freq[None, :, None].float().expand(positions.shape[0], -1, 1)
            angle = (frequency @ positions[:, None, :].float()).transpose(1, 2)
        else:
            angle = positions[:, :, None].float() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


@pytest.mark.parametrize("product", ["matmul", "broadcast"])
@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_rotary_tables_are_shared_and_rope_is_one_call(scaling: float, product: str) -> None:
    graph = raised(Rotary(8, scaling, product), torch.randn(2, 3, 5, 8), torch.arange(5).repeat(2, 1))
    assert names(graph) == ["rotary_table", "operator.getitem", "operator.getitem", "rope"]
    (table,) = graph.calls(torch.ops.qcompile.rotary_table.default)
    assert table.args[2] == scaling


@pytest.mark.parametrize(("activation", "name"), [
    (nn.functional.silu, "silu"), (nn.functional.gelu, "gelu"), (nn.functional.relu, "relu"),
    (lambda x: nn.functional.gelu(x, approximate="tanh"), "gelu_tanh"),
    (lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu_tanh"),
])  # fmt: skip
def test_gated_activations(activation: object, name: str) -> None:
    class Gate(nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return up * activation(gate)  # type: ignore[operator]

    graph = raised(Gate(), torch.randn(2, 16), torch.randn(2, 16))
    assert names(graph) == ["gated_activation"]
    assert graph.calls(torch.ops.qcompile.gated_activation.default)[0].args[2] == name


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_fused_attention_becomes_the_attention_operator(mask: str) -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
            given = {"boolean": keep, "additive": keep.float()}.get(mask)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=mask == "causal") + 0 * keep.sum()

    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    graph = raised(Attend(), q, k, v, torch.rand(2, 1, 5, 5) > 0.3)
    (node,) = graph.calls(torch.ops.qcompile.attention.default)
    assert node.args[6] is (mask == "causal")
    assert (node.args[4] is not None) is (mask in ("boolean", "additive"))


def test_the_sum_before_a_norm_is_fused_and_its_other_readers_follow() -> None:
    graph = raised(Gated(), torch.randn(2, 32))
    before = graph.clone()
    run(graph, FuseResidualNorm())
    assert "add_rms_norm" in names(graph)
    assert "rms_norm" not in names(graph)
    assert_same_function(before, graph)
