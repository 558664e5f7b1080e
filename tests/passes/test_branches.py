"""insert-low-rank-branch and split-outliers: what they change, what they save, and what they store."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import PipelineError, SourceError
from qcompile.ir.branches import is_branch
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.insert_low_rank_branch import InsertLowRankBranch
from qcompile.passes.manager import run_pipeline
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.split_outliers import SplitOutliers
from qcompile.quant.format import parse_format
from qcompile.quant.low_rank import absorb_error, absorb_weight
from qcompile.quant.reference import quantize, restore
from qcompile.quant.scheme import QuantScheme
from qcompile.target import resolve
from tests.passes.helpers import Gated, assert_same_function, capture, names

FORM = "int4 g16 sym fp16"


class Pair(nn.Module):
    """Two linears that read the same value, and one behind them."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.last = nn.Linear(size, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.left(x)) + self.right(x))


def graph_of(module: nn.Module, size: int = 64) -> Graph:
    graph = capture(module, torch.randn(3, size))
    run_pipeline(graph, [Canonicalize(), RaisePatterns()], PassContext(resolve("cpu", QuantScheme("fp32"))))
    return graph


def compiled(graph: Graph, *passes: Pass, form: str = FORM, samples: list[Tensor] | None = None, **scheme: object) -> Graph:
    """A copy of the graph after the passes."""
    result = graph.clone()
    calibration = None if samples is None else make_calibration(samples, Assets())
    target = resolve("cpu", QuantScheme("test", weight=parse_format(form), **scheme))  # type: ignore[arg-type]
    run_pipeline(result, passes, PassContext(target, calibration=calibration))
    return result


def error(before: Graph, after: Graph, x: Tensor) -> float:
    return float((after(x) - before(x)).square().mean() / before(x).square().mean())


def with_directions(module: nn.Module, rank: int, size: float) -> nn.Module:
    """Plant a few large directions in every weight."""
    generator = torch.Generator().manual_seed(0)
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            rows, columns = linear.weight.shape
            planted = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            linear.weight.data += size * planted * linear.weight.data.std()
    return module


@pytest.mark.parametrize("absorb", ["weight", "error"])
def test_a_branch_preserves_the_function(absorb: str) -> None:
    torch.manual_seed(0)
    graph = graph_of(Gated(), 32)
    split = compiled(graph, InsertLowRankBranch(rank=4, absorb=absorb))
    assert names(split).count("aten.linear") == 9
    assert_same_function(graph, split)


@pytest.mark.parametrize("target", ["cpu", "sm90"])
def test_a_branch_is_stored_in_sixteen_bits_and_not_quantized(target: str) -> None:
    graph = graph_of(Pair())
    dtype = torch.float16 if target == "cpu" else torch.bfloat16
    scheme = QuantScheme("test", weight=parse_format(FORM))
    ctx = PassContext(resolve(target, scheme))
    run_pipeline(
        graph,
        [ConvertDtype(to="fp32" if target == "cpu" else "bf16"), InsertLowRankBranch(rank=4), QuantizeWeights(), FuseDequantize()],
        ctx,
    )
    branches = {name: constant for name, constant in graph.constants.items() if is_branch(name)}
    assert {name: constant.shape for name, constant in branches.items() if name.startswith("left")} == {
        "left.weight.branch.low_rank_in": (4, 64), "left.weight.branch.low_rank_out": (64, 4),
    }  # fmt: skip
    assert {constant.dtype for constant in branches.values()} == {dtype}
    assert names(graph).count("quantized_linear") == 3
    assert names(graph).count("aten.linear") == 6


def test_planted_directions_are_absorbed() -> None:
    torch.manual_seed(0)
    graph = graph_of(with_directions(Pair(), 3, 4.0))
    x = torch.randn(200, 64)
    plain = error(graph, compiled(graph, QuantizeWeights()), x)
    absorbed = error(graph, compiled(graph, InsertLowRankBranch(rank=3, absorb="weight"), QuantizeWeights()), x)
    assert absorbed < plain / 30  # the weights that are left are 7 times smaller, and so are their steps


def test_absorbing_the_error_helps_where_there_are_no_outliers() -> None:
    torch.manual_seed(0)
    graph = graph_of(Pair())
    mix = torch.randn(64, 64) * torch.linspace(2.0, 0.05, 64)
    samples = [torch.randn(300, 64) @ mix for _ in range(3)]
    x = torch.randn(200, 64) @ mix
    plain, blind, weighted = (
        error(graph, compiled(graph, *passes, form="int3 g16 sym fp16", samples=data), x)
        for passes, data in (
            ((QuantizeWeights("mse-clip"),), None),
            ((InsertLowRankBranch(rank=8), QuantizeWeights("mse-clip")), None),
            ((InsertLowRankBranch(rank=8), QuantizeWeights("mse-clip")), samples),
        )
    )
    assert weighted < 0.55 * plain
    assert weighted < 0.8 * blind


def test_the_error_that_is_left_never_grows() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, mix = torch.randn(48, 64, generator=generator), torch.randn(64, 64, generator=generator)
    moment = mix @ mix.T
    form = parse_format(FORM)
    plain = (weight - restore(quantize(weight, form), form, 64)) @ mix
    for given in (None, moment):
        left, right = absorb_error(weight, form, 6, given)
        rest = weight - left @ right
        remaining = rest - restore(quantize(rest, form), form, 64)
        assert (remaining if given is None else remaining @ mix).square().sum() < (
            plain if given is not None else plain.new_tensor(1e9)
        ).square().sum()


def test_subspace_iteration_finds_the_largest_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 240, generator=generator) + torch.randn(200, 5, generator=generator) @ torch.randn(
        5, 240, generator=generator
    )
    left, right = absorb_weight(weight, 5)
    exact = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - left @ right).square().sum(), exact[5:].square().sum(), rtol=1e-3, atol=0)
    assert absorb_weight(weight, 500)[0].shape == (200, 200)


def planted_columns(module: nn.Module, columns: list[int], factor: float) -> nn.Module:
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data[:, columns] *= factor
    return module


def test_planted_columns_are_split_off() -> None:
    torch.manual_seed(0)
    module = planted_columns(Pair(), [5, 40], 30.0)
    graph = graph_of(module)
    x = torch.randn(200, 64)
    x[:, [5, 40]] /= 30.0
    plain = error(graph, compiled(graph, QuantizeWeights()), x)
    split = compiled(graph, SplitOutliers(columns=2), QuantizeWeights())
    assert split.constants["left.weight.branch.outlier_columns"].materialize().tolist() == [5, 40]
    assert error(graph, split, x) < plain / 10  # two of four groups had steps 30 times too large
    assert names(split).count("aten.index_select") == 2  # one for the siblings, one for the last


def test_the_columns_that_matter_are_found_by_the_data() -> None:
    torch.manual_seed(0)
    graph = graph_of(Pair())
    loud = torch.ones(64)
    loud[[3, 17]] = 50.0
    samples = [torch.randn(200, 64) * loud for _ in range(2)]
    split = compiled(graph, SplitOutliers(columns=2), QuantizeWeights(), samples=samples)
    assert split.constants["left.weight.branch.outlier_columns"].materialize().tolist() == [3, 17]
    plain, better = (
        error(graph, compiled(graph, *passes, samples=samples, ignore=("last",)), samples[0])
        for passes in ((QuantizeWeights(),), (SplitOutliers(columns=2), QuantizeWeights()))
    )
    assert better < plain / 20


def test_the_split_alone_loses_only_what_sixteen_bits_lose() -> None:
    torch.manual_seed(0)
    graph = graph_of(planted_columns(Pair(), [1, 2], 8.0))
    split = compiled(graph, SplitOutliers(columns=4))
    assert_same_function(graph, split, rtol=2.0**-10)
    weight = split.constants["right.weight"].materialize()
    assert int((weight == 0).all(0).sum()) == 4


def test_quantized_activations_are_split_by_their_own_outliers() -> None:
    from qcompile.quant.scheme import W8A8

    torch.manual_seed(0)
    graph = graph_of(Pair())
    loud = torch.ones(64)
    loud[[7, 9]] = 100.0
    samples = [torch.randn(200, 64) * loud]
    split = compiled(graph, SplitOutliers(columns=2), samples=samples, activation=W8A8.activation)
    assert split.constants["left.weight.branch.outlier_columns"].materialize().tolist() == [7, 9]
    mask = split.constants["left.weight.branch.kept_columns"].materialize()
    assert mask.nonzero().flatten().tolist() == [column for column in range(64) if column not in (7, 9)]
    assert_same_function(graph, split, rtol=2.0**-10)
    with pytest.raises(SourceError, match="expected calibration data, got none"):
        compiled(graph, SplitOutliers(columns=2), activation=W8A8.activation)


def test_a_weight_that_something_else_reads_is_left_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    graph = capture(Tied(), torch.randint(0, 20, (2, 3)))
    for step in (InsertLowRankBranch(rank=2), SplitOutliers(columns=2)):
        copy = graph.clone()
        ctx = PassContext(resolve("cpu", QuantScheme("test", weight=parse_format(FORM))))
        assert not step.run(copy, ctx)
        assert copy.fingerprint() == graph.fingerprint()


@pytest.mark.parametrize(("step", "message"), [
    (InsertLowRankBranch(rank=0), "insert-low-rank-branch: expected rank of at least 1 .* got rank=0"),
    (InsertLowRankBranch(absorb="all"), "absorb as one of error, weight, got .* absorb='all'"),
    (SplitOutliers(columns=0), "split-outliers: option columns: expected at least 1, got 0"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(step: Pass, message: str) -> None:
    graph = graph_of(Pair())
    with pytest.raises(PipelineError, match=message):
        compiled(graph, step)
