"""Filters are rounded against the patches that they see, and biases take back what that does to the mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.manager import run_pipeline
from qcompile.passes.patches import CONVOLUTIONS, patch_moments, patches
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.stream import stream
from qcompile.passes.work import WorkStore
from qcompile.quant.format import parse_format
from qcompile.quant.scheme import QuantScheme
from qcompile.target import resolve
from tests.passes.helpers import capture

WINDOWS = {
    "full": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, (3, 5), padding=(1, 2), groups=4),
    "grouped": nn.Conv2d(4, 6, 3, dilation=2, groups=2),
    "time": nn.Conv1d(4, 6, 3, padding=1, bias=False),
}


def _input(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 9, generator=generator) if name == "time" else torch.randn(2, 4, 9, 8, generator=generator)


@pytest.mark.parametrize("name", WINDOWS)
def test_filters_times_patches_are_the_convolution(name: str) -> None:
    x, filters = _input(name), WINDOWS[name]
    graph = capture(filters, x)
    (node,) = graph.calls(*CONVOLUTIONS)
    seen = patches(node, x)
    weight = filters.weight.detach().reshape(filters.groups, -1, seen.shape[2])
    product = torch.bmm(weight, seen.transpose(1, 2)).reshape(len(filters.weight), len(x), -1).transpose(0, 1)
    expected = nn.functional.conv1d if name == "time" else nn.functional.conv2d
    wanted = expected(x, filters.weight, None, filters.stride, filters.padding, filters.dilation, filters.groups).detach()
    torch.testing.assert_close(product, wanted.flatten(2), rtol=1e-5, atol=1e-5)


def test_moments_are_those_of_all_patches() -> None:
    samples = [_input("depthwise", seed) for seed in range(3)]
    graph = capture(WINDOWS["depthwise"], samples[0])
    (node,) = graph.calls(*CONVOLUTIONS)
    found = []
    stream(graph, make_calibration(samples, Assets()), lambda node, inputs: found.append(patch_moments(node, inputs)), [node])
    seen = torch.cat([patches(node, sample) for sample in samples], dim=1)
    torch.testing.assert_close(found[0].mean, seen.mean(1), rtol=1e-5, atol=1e-5)
    for group, rows in enumerate(seen):
        torch.testing.assert_close(found[0].covariance()[group], torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-5)


def test_of_a_large_map_a_lattice_of_places_counts() -> None:
    x = torch.arange(48.0 * 48).view(1, 1, 48, 48)
    graph = capture(nn.Conv2d(1, 1, 1), x)
    (node,) = graph.calls(*CONVOLUTIONS)
    assert torch.equal(patches(node, x, 256).view(16, 16), x[0, 0, 1::3, 1::3])


class Edges(nn.Module):
    """A depthwise edge detector with large taps that sum to nothing, on an input far from zero; then a mixing of channels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.edges, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            taps = torch.randn(8, 1, 3, 3, generator=generator)
            self.edges.weight.copy_(10 * (taps - taps.mean((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.nn.functional.relu6(self.edges(x)))


def _pictures(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.nn.functional.interpolate(torch.randn(4, 8, 5, 5, generator=generator), (16, 16), mode="bilinear")


def _rounded(graph: Graph, rounding: str, samples: list[Tensor], work: WorkStore | None = None) -> Graph:
    result = graph.clone()
    calibration = make_calibration(samples, Assets())
    scheme = QuantScheme("test", weight=parse_format("int8 channel sym fp16"))
    run_pipeline(result, [QuantizeWeights(rounding=rounding)], PassContext(resolve("cpu", scheme), calibration=calibration, work=work))
    return result


def test_rounding_against_patches_loses_several_times_less() -> None:
    samples, fresh = [_pictures(seed) for seed in range(4)], _pictures(9)
    graph = capture(Edges(), fresh)
    errors = {way: float((_rounded(graph, way, samples)(fresh) - graph(fresh)).pow(2).mean()) for way in ("nearest", "mse-clip", "gptq")}
    assert errors["gptq"] < 0.2 * min(errors["nearest"], errors["mse-clip"])


def test_the_mean_of_what_comes_out_stays() -> None:
    x = _pictures(0)
    graph = capture(WINDOWS["depthwise"], x[:, :4])
    shift = (_rounded(graph, "gptq", [x[:, :4]])(x[:, :4]) - graph(x[:, :4])).mean((0, 2, 3))
    before = (_rounded(graph, "nearest", [x[:, :4]])(x[:, :4]) - graph(x[:, :4])).mean((0, 2, 3))
    assert float(shift.abs().max()) < 1e-5 < float(before.abs().max())


def test_a_convolution_without_a_bias_is_rounded_too() -> None:
    samples = [_input("time", seed) for seed in range(3)]
    graph = capture(WINDOWS["time"], samples[0])
    result = _rounded(graph, "gptq", samples)
    error, nearest = ((made(samples[0]) - graph(samples[0])).pow(2).mean() for made in (result, _rounded(graph, "nearest", samples)))
    assert 0 < float(error) < float(nearest)


def test_biases_are_kept_with_the_weights(tmp_path: Path) -> None:
    samples = [_pictures(seed) for seed in range(2)]
    graph = capture(Edges(), samples[0])
    first = _rounded(graph, "gptq", samples, WorkStore("", tmp_path))
    again = _rounded(graph, "gptq", samples, WorkStore("", tmp_path))
    torch.testing.assert_close(first(samples[0]), again(samples[0]), rtol=0, atol=0)
