"""What the tests of basis passes share: one run over a family's graph, calibration data, planted outliers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.calibration import Calibration, CalibrationData
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.manager import run_pipeline
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.statistics import Request
from qcompile.quant import activations
from tests.models import CAUSAL_FAMILIES, VOCABULARY, example_inputs
from tests.passes.helpers import Gated, capture, context
from tests.passes.space_cases import EXACT, canonical, family_graph, family_outputs


def calibrated(family: str = "llama", target: str = "cpu-w4a8") -> PassContext:
    """A context with data for `tiny(family)`."""
    return with_data(calibration_tokens() if family in CAUSAL_FAMILIES else [example_inputs(family, seed=seed) for seed in (1, 2)], target)


def with_data(data: Tensor | list[dict[str, Tensor]], target: str = "cpu-w4a8") -> PassContext:
    """A context with token windows, or with inputs of a module."""
    given = CalibrationData("test", data) if isinstance(data, Tensor) else CalibrationData("test", samples=tuple(data))
    return context(target, calibration=Calibration(lambda: given))


def calibration_tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(9))


def after(family: str, *passes: Pass, ctx: PassContext | None = None) -> tuple[Graph, bool]:
    """The family's graph after `passes`, checked to compute the same; and whether the last of them changed anything."""
    graph = family_graph(family).clone()
    records = run_pipeline(graph, passes, ctx or calibrated(family))
    assert relative_error(outputs(graph, wide=True), family_outputs(family)) <= EXACT
    return graph, records[-1].changed


class Outliers(nn.Module):
    """A gated feed-forward layer of which three stream channels and two hidden channels are far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Linear(64, 64, bias=False), Gated(64, 96), nn.Linear(64, 8)
        with torch.no_grad():
            self.inner.norm.weight.fill_(1.0)
            self.inner.up.weight[[7, 50]] *= 30
            self.embed.weight[[3, 17, 40]] *= 40

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)))


def outlier_graph() -> tuple[Graph, PassContext]:
    """The graph of `Outliers` with folded norms, and a context with data for it."""
    inputs = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    graph = canonical(capture(Outliers(), inputs[0]))
    ctx = with_data([{"x": sample} for sample in inputs])
    run_pipeline(graph, [FoldNorms()], ctx)
    return graph, ctx


def rounding_error(graph: Graph, ctx: PassContext, linear: int) -> float:
    """Energy of the error of the linear's input rounded to int4 in groups of 16 channels, channel by channel over the channel's energy.

    Averaged over channels: the many small ones count as much as the outliers that hide them.
    """
    node = graph.calls(torch.ops.aten.linear.default)[linear]
    request = Request(str(node.args[0]), "sample")
    rows = ctx.statistics(graph, [request])[request]
    codes, scale = activations.quantize(rows, 4, 16)
    error = activations.dequantize(codes, scale, None, 16, rows.dtype) - rows
    return float((error.square().mean(0) / rows.square().mean(0)).mean())


def weight_error(graph: Graph, expected: list[Tensor]) -> float:
    """Relative error of the outputs on the examples with all weights rounded to nearest, int4 in groups of 64."""
    rounded = graph.clone()
    run_pipeline(rounded, [QuantizeWeights()], context("cpu-int4"))
    return relative_error(outputs(rounded, wide=True), expected)
