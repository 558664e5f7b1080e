"""A new outlier pass: channels are scaled until what writes them and what reads them have equal ranges (arXiv:1906.04721).

The analysis of spaces says which scales a model absorbs, whatever its architecture; the pass only chooses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import qcompile
from qcompile.ir.basis import Diagonal
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.pipelines import default_pipeline, insert
from qcompile.passes.space_channels import block_map, member_magnitudes
from qcompile.passes.spaces import Kind, Space, apply_basis_change, find_spaces
from qcompile.target import parse_target


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Scale each channel of each space that admits a diagonal so that its largest weight is the same on both sides."""

    name: ClassVar[str] = "equalize-channels"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """One change of basis per space with a writer and a reader; the manager checks that the function stays."""
        spaces = [space for space in find_spaces(graph, Kind.DIAGONAL) if space.writers and space.readers and ctx.spend()]
        for space in spaces:
            scale = (_range(graph, space, read=True) / _range(graph, space, read=False)).sqrt()
            apply_basis_change(graph, space, block_map(space, Diagonal, scale), ctx)
        return bool(spaces)


def _range(graph: Graph, space: Space, *, read: bool) -> Tensor:
    """The largest magnitude of each channel over the matrices that read the space, or that write it; never 0."""
    members = [member for member in space.members if member.contravariant == read and len(graph.constants[member.name].shape) > 1]
    return torch.stack([member_magnitudes(graph, space, member) for member in members]).amax(0).clamp(min=1e-6)


class FeedForward(nn.Module):
    """Gated, with a residual and a norm; some hidden channels are written large and read small: outliers that mean nothing."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        with torch.no_grad():
            self.up.weight[::7] *= 50
            self.down.weight[:, ::7] /= 50

    def forward(self, x: Tensor) -> Tensor:
        """X [B, S, width] to the same shape."""
        y = self.norm(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return result


def main() -> None:
    """Compile a block for int4 with and without the pass, checked, and compare both with the block itself."""
    torch.manual_seed(0)
    model, x = FeedForward(64, 192).eval(), torch.randn(4, 16, 64)
    plain = default_pipeline(parse_target("cpu-int4"), "nearest")
    with torch.no_grad():
        expected = model(x)
    for title, passes in (("plain", plain), ("equalized", insert(plain, EqualizeChannels(), before="rewrite-kv-cache"))):
        compiled = qcompile.compile(model, target="cpu-int4", example_inputs=x, passes=passes, check=True)
        error = (compiled(x) - expected).norm() / expected.norm()
        print(f"{title:>10}: int4 differs from float by {100 * error:.2f} %")


if __name__ == "__main__":
    main()
