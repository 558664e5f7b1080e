"""Small graphs for pass tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.frontend.capture import capture_module
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.manager import run_pipeline
from qcompile.target import parse_target


def context(target: str = "cpu-fp32", **options: Any) -> PassContext:
    """A context without a backend."""
    return PassContext(parse_target(target), **options)


def capture(module: nn.Module, *inputs: Tensor) -> Graph:
    """The module's graph, batch symbolic."""
    return capture_module(module.eval(), inputs)


def run(graph: Graph, *passes: Pass, target: str = "cpu-fp32") -> PassContext:
    """Run passes through the manager (verified, claims checked)."""
    ctx = context(target)
    run_pipeline(graph, passes, ctx)
    return ctx


def assert_same_function(before: Graph, after: Graph, rtol: float = 1e-9) -> None:
    """The outputs of both agree in float64 up to rounding."""
    assert relative_error(outputs(after, wide=True), outputs(before, wide=True)) <= rtol


def names(graph: Graph) -> list[str]:
    """The operators of the graph in order, without constants."""
    from qcompile.ir.graph import operator_name

    return [operator_name(node.target) for node in graph.nodes if node.op == "call_function"]


class RmsNorm(nn.Module):
    """As Llama writes it, or with Gemma's `1 + weight`."""

    def __init__(self, size: int, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return normed * (1.0 + self.weight) if self.offset else self.weight * normed.to(x.dtype)


class Gated(nn.Module):
    """A gated feed-forward layer behind a norm, with a residual."""

    def __init__(self, size: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm = RmsNorm(size)
        self.gate, self.up = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + 1.0 * x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
