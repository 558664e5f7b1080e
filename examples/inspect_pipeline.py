"""See what the compiler did: a small model with outliers is compiled with a dump, its tables printed, its report written.

Three channels of the residual stream are far larger than the others, as in language models. Open the report that this names and look
at Distributions: the rotation spreads them over all channels, and the weights' rounding to 4 bits costs less for it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import qcompile
from qcompile.dump.reader import Dump
from qcompile.dump.tables import coverage_table, pass_table

LAYERS, WIDTH = 4, 128


class Norm(nn.Module):
    """By the root of the mean square, as language models write it."""

    def __init__(self) -> None:
        """Gains of 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, WIDTH] to the same shape."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A gated layer with a residual connection, on [B, S, WIDTH]."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.norm = Norm()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input, and what the layer adds to it."""
        read = self.norm(x)
        added: Tensor = self.down(nn.functional.silu(self.gate(read)) * self.up(read))
        return x + added


class Model(nn.Module):
    """`LAYERS` blocks between two linears: [B, S, 64] to [B, S, 32]."""

    def __init__(self) -> None:
        """Random weights, three rows of the first times 30."""
        super().__init__()
        self.first = nn.Linear(64, WIDTH, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.last = Norm(), nn.Linear(WIDTH, 32, bias=False)
        with torch.no_grad():
            self.first.weight[[5, 40, 99]] *= 30

    def forward(self, x: Tensor) -> Tensor:
        """Through all blocks."""
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.last(self.norm(x))
        return out


def main(directory: Path | None = None) -> None:
    """Compile with a dump, print what each pass did and where the outliers went, and say where the report is."""
    torch.manual_seed(0)
    dump = directory or Path(tempfile.mkdtemp(prefix="qcompile-dump-"))
    compiled = qcompile.compile(Model().eval(), "cpu-int4", example_inputs=torch.randn(4, 16, 64), check=True, dump=dump)
    console = Console(width=140)
    console.print(pass_table(compiled.records))
    console.print(coverage_table(compiled.coverage))
    for item in Dump.open(dump).distributions["activations"]:
        first, last = item["stages"][0], item["stages"][-1]
        print(f"input of {item['name']}: max/rms {first['max_over_rms']:.3g} -> {last['max_over_rms']:.3g}")
    print(f"the report: {dump / 'report.html'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
