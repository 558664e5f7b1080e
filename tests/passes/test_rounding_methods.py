"""quantize-weights with data: sequential, siblings together, resumable; and weights that are looked at alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import SourceError
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes import round_sequentially as sequential
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.manager import run_pipeline
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.work import WorkStore
from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.reference import Quantized, restore
from qcompile.quant.rounding.gptq import gptq
from qcompile.quant.scheme import QuantScheme
from qcompile.target import resolve
from tests.passes.helpers import Gated, capture, names

aten = torch.ops.aten


def correlated(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs a few of whose directions carry most of the energy, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(2.0, 0.05, columns)
    return torch.randn(rows, columns, generator=generator) @ mix


def canonical(module: nn.Module, *inputs: Tensor) -> Graph:
    graph = capture(module, *inputs)
    run_pipeline(graph, [Canonicalize(), RaisePatterns()], PassContext(resolve("cpu", QuantScheme("fp32"))))
    return graph


def quantized(
    graph: Graph, rounding: str, form: str = "int4 g16 sym fp16", samples: list[Tensor] | None = None, work: WorkStore | None = None
) -> Graph:  # fmt: skip
    """A copy of the graph with its weights rounded."""
    result = graph.clone()
    scheme = QuantScheme("test", weight=parse_format(form))
    ctx = PassContext(resolve("cpu", scheme), work=work, calibration=None if samples is None else make_calibration(samples, Assets()))
    run_pipeline(result, [QuantizeWeights(rounding=rounding)], ctx)
    return result


def parts(graph: Graph) -> dict[str, Tensor]:
    return {name: constant.materialize() for name, constant in graph.constants.items() if constant.format is not None}


def output_error(before: Graph, after: Graph, samples: list[Tensor]) -> float:
    return sum(float((after(sample) - before(sample)).square().mean()) for sample in samples)


def test_gptq_needs_data_and_says_how_to_give_it() -> None:
    graph = canonical(Gated(), torch.randn(3, 32))
    with pytest.raises(SourceError, match=r"quantize-weights\{rounding=gptq\}: expected calibration data, got none; pass calibration="):
        quantized(graph, "gptq")


@pytest.mark.parametrize("form", ["int4 g16 sym fp16", "int3 g16 asym fp16", "nf4 g16 sym fp16", "int4 g16 sym int8", "fp4 g16 sym e4m3"])
def test_methods_that_try_harder_lose_less(form: str) -> None:
    torch.manual_seed(0)
    graph = canonical(Gated(), torch.randn(3, 32))
    samples = [correlated(256, 32, seed) for seed in range(4)]
    nearest, clipped, second = (
        output_error(graph, quantized(graph, way, form, samples), samples) for way in ("nearest", "mse-clip", "gptq")
    )
    assert second < 0.8 * nearest
    assert second < clipped


def test_later_weights_are_rounded_against_what_rounded_ones_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    graph = canonical(module, torch.randn(3, 16))
    sample = correlated(200, 16, 1)
    seen: list[Tensor] = []

    def watched(weight: Tensor, moment: Tensor, form: QuantFormat, name: str) -> Quantized:
        seen.append(moment)
        return gptq(weight, moment, form, name=name)

    monkeypatch.setitem(_roundings(), "gptq", sequential.round_sequentially(watched, "gptq"))
    result = quantized(graph, "gptq", samples=[sample])
    form = parse_format("int4 g16 sym fp16")
    packed = parts(result)
    first = restore(Quantized(packed["0.weight.codes"], packed["0.weight.scale"], None), form, 16)
    hidden = torch.relu(nn.functional.linear(sample, first, module[0].bias)).detach()
    torch.testing.assert_close(seen[0], sample.T @ sample / 200, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], hidden.T @ hidden / 200, rtol=1e-5, atol=1e-5)


def _roundings() -> dict[str, object]:
    from qcompile.passes.roundings import ROUNDINGS

    return ROUNDINGS  # type: ignore[return-value]


def test_siblings_share_one_second_moment_and_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Gated()
    graph = canonical(module, torch.randn(3, 32))
    calls: list[tuple[int, ...]] = []

    def watched(weight: Tensor, moment: Tensor, form: QuantFormat, name: str) -> Quantized:
        calls.append(tuple(weight.shape))
        assert name in ("gate.weight, up.weight", "down.weight")
        return gptq(weight, moment, form, name=name)

    monkeypatch.setitem(_roundings(), "gptq", sequential.round_sequentially(watched, "gptq"))
    result = quantized(graph, "gptq", "int4 g16 sym int8", samples=[correlated(100, 32, 2)])
    assert calls == [(96, 32), (32, 48)]
    packed = parts(result)
    assert packed["up.weight.codes"].shape == (48, 16)
    assert packed["up.weight.scale2"].shape == (48, 1)
    values = Quantized(packed["up.weight.codes"], packed["up.weight.scale"], None, packed["up.weight.scale2"])
    up = restore(values, parse_format("int4 g16 sym int8"), 32)
    assert float((up - module.up.weight).detach().square().mean()) < 0.05 * float(module.up.weight.detach().square().mean())


def test_interrupted_rounding_continues_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    graph = canonical(Gated(), torch.randn(3, 32))
    samples = [correlated(100, 32, 3)]
    whole = parts(quantized(graph, "gptq", samples=samples))
    rounded: list[str] = []

    def failing(weight: Tensor, moment: Tensor, form: QuantFormat, name: str) -> Quantized:
        rounded.append(name)
        if name == "down.weight" and rounded.count(name) == 1:
            raise KeyboardInterrupt
        return gptq(weight, moment, form, name=name)

    monkeypatch.setitem(_roundings(), "gptq", sequential.round_sequentially(failing, "gptq"))
    with pytest.raises(KeyboardInterrupt):
        quantized(graph, "gptq", samples=samples, work=WorkStore("", tmp_path))
    resumed = parts(quantized(graph, "gptq", samples=samples, work=WorkStore("", tmp_path)))
    assert rounded == ["gate.weight, up.weight", "down.weight", "down.weight"]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_results_of_other_data_or_another_format_are_not_taken_up(tmp_path: Path) -> None:
    graph = canonical(Gated(), torch.randn(3, 32))
    quantized(graph, "gptq", samples=[correlated(100, 32, 3)], work=WorkStore("", tmp_path))
    stored = len(list(tmp_path.iterdir()))
    quantized(graph, "gptq", samples=[correlated(100, 32, 4)], work=WorkStore("", tmp_path))
    quantized(graph, "gptq", "int4 g32 sym fp16", samples=[correlated(100, 32, 4)], work=WorkStore("", tmp_path))
    assert len(list(tmp_path.iterdir())) == 3 * stored


class Convolutions(nn.Module):
    """Three convolutions: full, depthwise, and over time."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.time = nn.Conv1d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.depth(torch.relu(self.full(x)))
        return self.time(hidden.flatten(1).reshape(x.shape[0], 4, -1))


@pytest.mark.parametrize("rounding", ["nearest", "mse-clip"])
def test_convolutions_are_rounded_per_channel_in_eight_bits(rounding: str) -> None:
    torch.manual_seed(0)
    graph = canonical(Convolutions(), torch.randn(2, 3, 8, 8))
    result = quantized(graph, rounding, "int8 channel sym fp16")
    assert names(result).count("dequantize") == 3
    assert result.constants["depth.weight.codes"].shape == (8, 9)
    assert relative_error(outputs(result, wide=True), outputs(graph, wide=True)) < 0.02


def test_the_coverage_table_shows_the_format_of_convolutions() -> None:
    graph = canonical(Convolutions(), torch.randn(2, 3, 8, 8))
    ctx = PassContext(resolve("cpu", QuantScheme("test", weight=parse_format("int8 channel sym fp16"))))
    run_pipeline(graph, [QuantizeWeights(), LowerToKernels()], ctx)
    rows = {row.weight: row.format for row in ctx.coverage}
    assert rows == {f"{name}.weight": "int8 channel sym fp16" for name in ("full", "depth", "time")}


def test_convolutions_are_left_alone_below_eight_bits() -> None:
    graph = canonical(Convolutions(), torch.randn(2, 3, 8, 8))
    ctx = PassContext(resolve("cpu", QuantScheme("test", weight=parse_format("int4 g64 sym fp16"))))
    assert not QuantizeWeights().run(graph, ctx)
    assert {reason for _, _, reason, _ in ctx.notes} == {"convolutions stay in high precision below 8 bits"}
    assert all(chosen for *_, chosen in ctx.notes)


class Shared(nn.Module):
    """One weight behind two linears, and one behind an embedding and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.twice = nn.Linear(16, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.twice(torch.relu(self.twice(self.table(ids))))
        return nn.functional.linear(hidden, self.table.weight)


def test_weights_that_several_nodes_read_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (4, 9))
    graph = canonical(Shared(), ids)
    calls: list[str] = []

    def watched(weight: Tensor, moment: Tensor, form: QuantFormat, name: str) -> Quantized:
        calls.append(name)
        return gptq(weight, moment, form, name=name)

    monkeypatch.setitem(_roundings(), "gptq", sequential.round_sequentially(watched, "gptq"))
    scheme = QuantScheme("test", weight=parse_format("int4 g16 sym fp16"), quantize_head=True, quantize_embedding=True)
    result = graph.clone()
    run_pipeline(result, [QuantizeWeights("gptq")], PassContext(resolve("cpu", scheme), calibration=make_calibration([ids], Assets())))
    assert calls == ["twice.weight"]  # the table is an embedding first, and no second moment says what its columns are worth
    assert sorted(result.constants) == ["table.weight.codes", "table.weight.scale", "twice.weight.codes", "twice.weight.scale"]
    assert names(result).count("dequantize") == 2
