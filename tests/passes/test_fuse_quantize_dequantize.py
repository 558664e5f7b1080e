"""fuse-quantize-dequantize: integer matmuls with scales in the epilogue, producers that quantize, and a reason for all that is left."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile.codegen.select import backend_for
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.passes.activation_pairs import PRODUCERS
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.fuse_quantize_dequantize import FuseQuantizeDequantize
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.quant.element import NF4
from qcompile.quant.format import QuantFormat
from qcompile.quant.hadamard import mixing_matrix
from qcompile.quant.scheme import FP8_DYNAMIC, W4A4, W4A8, W8A8, QuantScheme
from qcompile.target import resolve
from tests.golden import assert_golden
from tests.models import tiny
from tests.passes.helpers import Gated, assert_same_function, capture, names
from tests.passes.helpers import context as context_for
from tests.passes.test_quantize_activations import STATIC, context

aten = torch.ops.aten
ops = torch.ops.qcompile
QUANTIZE: tuple[Pass, ...] = (Canonicalize(), RaisePatterns(), QuantizeActivations(), QuantizeWeights(), FuseResidualNorm())


def fused(module: nn.Module, x: Tensor, scheme: QuantScheme = W8A8, data: list[Tensor] | None = None) -> tuple[Graph, Graph, Any]:
    """The graph before and after the pass, and the context."""
    graph, ctx = capture(module, x), context(scheme, data)
    run_pipeline(graph, QUANTIZE, ctx)
    before = graph.clone()
    run_pipeline(graph, [FuseQuantizeDequantize()], ctx)
    return before, graph, ctx


@pytest.mark.parametrize(
    "scheme",
    [W8A8, W4A8, W4A4, FP8_DYNAMIC, W8A8.with_options(activation_symmetric=False), W4A8.with_options(symmetric=False), STATIC],
    ids=lambda scheme: f"{scheme.weight} x {scheme.activation}",
)
def test_every_pair_ends_in_a_matmul_of_codes_and_no_value_changes(scheme: QuantScheme) -> None:
    data = [torch.randn(3, 32)] if scheme is STATIC else None
    before, after, _ = fused(Gated(), torch.randn(3, 32), scheme, data)
    kept = names(after)
    assert "dequantize_activation" not in kept
    assert "dequantize" not in kept
    assert kept.count("float8_linear" if scheme is FP8_DYNAMIC else "integer_linear") == 3
    assert_same_function(before, after)


@pytest.mark.parametrize("symmetric", [True, False])
def test_producers_quantize_their_own_results(symmetric: bool) -> None:
    before, graph, ctx = fused(Gated(), torch.randn(3, 32), W8A8.with_options(activation_symmetric=symmetric))
    suffix = "" if symmetric else "_asym"
    assert {f"add_norm_quantize{suffix}", f"gated_quantize{suffix}"} <= set(names(graph))
    left = {"rms_norm", "add_rms_norm", "gated_activation", "quantize_activation", "quantize_activation_asym"}
    assert not left & set(names(graph))
    assert reasons(ctx) == []
    assert_same_function(before, graph)


def test_the_listing_of_a_llama_is_the_golden_one() -> None:
    graph, ctx = load(tiny("llama")).graph, context_for("cpu-w8a8")
    pipeline = default_pipeline(ctx.target, "nearest")
    run_pipeline(graph, pipeline[: [step.name for step in pipeline].index("lower-to-kernels")], ctx)
    assert_golden("llama_w8a8.txt", graph.text())


def rotated(graph: Graph, size: int) -> None:
    """Put a rotation in front of every quantize."""
    for node in graph.calls(ops.quantize_activation.default):
        value = node.args[0]
        matrix = graph.add_constant("mixing", mixing_matrix(size)) if mixing_matrix(size) is not None else None
        turned = graph.insert(node, ops.hadamard.default, (value, matrix, size))
        node.update_arg(0, turned)


def test_a_rotation_in_between_is_part_of_the_operator() -> None:
    graph, ctx = capture(Gated(), torch.randn(3, 32)), context(W8A8)
    run_pipeline(graph, QUANTIZE[:-1], ctx)
    rotated(graph, 16)
    before = graph.clone()
    run_pipeline(graph, [FuseResidualNorm(), FuseQuantizeDequantize()], ctx)
    assert "hadamard" not in names(graph)
    sizes = [node.args[6] for node in graph.calls(ops.add_norm_quantize.default)]
    assert sizes == [16]
    assert [node.args[4] for node in graph.calls(ops.gated_quantize.default)] == [16]
    assert_same_function(before, graph)


class Plain(nn.Module):
    """Two linears around something."""

    def __init__(self, between: Any, size: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(32, 32), nn.Linear(size, 8), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def test_a_rotation_of_what_cannot_quantize_becomes_one_operator_with_it() -> None:
    graph, ctx = capture(Plain(torch.tanh), torch.randn(3, 32)), context(W8A8)
    run_pipeline(graph, QUANTIZE, ctx)
    rotated(graph, 32)
    before = graph.clone()
    run_pipeline(graph, [FuseQuantizeDequantize()], ctx)
    assert names(graph).count("hadamard_quantize") == 2
    assert_same_function(before, graph)


VIEWS = {
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0, 2),
    "reshape": lambda x: x.reshape(-1, x.shape[-1]),
    "flatten": lambda x: x.flatten(0, 1),
    "select": lambda x: x[:, 1],
    "slice": lambda x: x[:, 1:3],
    "columns": lambda x: x[..., 8:24],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "expand": lambda x: x.unsqueeze(0).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", [W8A8, W4A4.with_options(activation_group_size=8), STATIC], ids=lambda scheme: str(scheme.activation))
def test_a_dequantize_moves_through_what_only_moves_elements(view: str, scheme: QuantScheme) -> None:
    """A pair is put in front of the view, where nothing would put it: the matmul behind it still reads codes."""
    size = 16 if view == "columns" else 32
    graph, ctx = capture(Plain(VIEWS[view], size), torch.randn(4, 4, 32)), context(scheme, [torch.randn(4, 4, 32)])
    run_pipeline(graph, QUANTIZE, ctx)
    pair = graph.calls(ops.dequantize_activation.default)[1]
    quantize = pair.args[0]
    while quantize.target is operator.getitem:  # type: ignore[union-attr]
        quantize = quantize.args[0]  # type: ignore[union-attr]
    moved_above(graph, quantize, pair)  # type: ignore[arg-type]
    before = graph.clone()
    run_pipeline(graph, [FuseQuantizeDequantize()], ctx)
    kept = names(graph)
    in_groups = view == "columns" and scheme is not W8A8 and scheme is not STATIC
    assert kept.count("integer_linear") == (1 if in_groups else 2)
    assert ("dequantize_activation" in kept) == in_groups
    assert_same_function(before, graph)


def moved_above(graph: Graph, quantize: fx.Node, pair: fx.Node) -> None:
    """Quantize what the views before a pair look at, and let them look at the dequantized values."""
    last: Any = quantize.args[0]
    first = last
    while first.args[0].target is not aten.linear.default:
        first = first.args[0]
    source = first.args[0]
    above = [graph.insert(first, quantize.target, (source, *quantize.args[1:]))]  # type: ignore[arg-type]
    if quantize.target is not ops.quantize_static.default:
        above += [graph.insert(first, operator.getitem, (above[0], index)) for index in (0, 1)]
    parts = above[1:] if len(above) > 1 else (above[0], pair.args[1])
    pulled = graph.insert(first, pair.target, (*parts, *pair.args[2:]))  # type: ignore[arg-type]
    first.update_arg(0, pulled)
    pair.replace_all_uses_with(last)
    graph.remove_dead()


@pytest.mark.parametrize("scheme", [W8A8, W4A4, STATIC], ids=lambda scheme: str(scheme.activation))
def test_a_pair_that_is_quantized_again_in_the_same_format_cancels(scheme: QuantScheme) -> None:
    graph, ctx = capture(nn.Linear(32, 8), torch.randn(3, 32)), context(scheme, [torch.randn(3, 32)])
    run_pipeline(graph, QUANTIZE, ctx)
    (pair,) = graph.calls(ops.dequantize_activation.default)
    quantize = graph.calls(ops.quantize_activation.default, ops.quantize_static.default)[0]
    reader = next(iter(pair.users))
    again = graph.insert(reader, quantize.target, (pair, *quantize.args[1:]))  # type: ignore[arg-type]
    parts: Any = (again, pair.args[1])
    if scheme is not STATIC:
        parts = [graph.insert(reader, operator.getitem, (again, index)) for index in (0, 1)]
    reader.update_arg(0, graph.insert(reader, pair.target, (*parts, *pair.args[2:])))  # type: ignore[arg-type]
    before = graph.clone()
    run_pipeline(graph, [FuseQuantizeDequantize()], ctx)
    assert [name for name in names(graph) if "quantize" in name] == [quantize.target.__name__.split(".")[0]]  # type: ignore[union-attr]
    assert_same_function(before, graph)


def test_asymmetric_codes_that_are_quantized_again_are_others() -> None:
    """Of -0.5, 0 and 14.5 steps the lowest rounds to 0 like its zero point, and the range that is left is 14 steps."""
    graph, ctx = capture(nn.Linear(32, 8), torch.randn(3, 32)), context(W4A4.with_options(activation_symmetric=False))
    run_pipeline(graph, QUANTIZE, ctx)
    (pair,) = graph.calls(ops.dequantize_activation.default)
    quantize, reader = graph.calls(ops.quantize_activation_asym.default)[0], next(iter(pair.users))
    again = graph.insert(reader, quantize.target, (pair, *quantize.args[1:]))  # type: ignore[arg-type]
    parts = [graph.insert(reader, operator.getitem, (again, index)) for index in range(3)]
    reader.update_arg(0, graph.insert(reader, pair.target, (*parts, *pair.args[3:])))  # type: ignore[arg-type]
    run_pipeline(graph, [FuseQuantizeDequantize()], ctx)
    assert names(graph).count("quantize_activation_asym") == 2
    x = torch.tensor([[-0.5, 0.0, 14.5]])
    first = ops.quantize_activation_asym(x, 4, -1)
    second = ops.quantize_activation_asym(ops.dequantize_activation(*first, -1, torch.float32), 4, -1)
    assert (first[1].item(), second[1].item()) == (1.0, pytest.approx(14 / 15))


def reasons(ctx: Any) -> list[str]:
    """What the pass noted."""
    return [reason for where, _, reason, _ in ctx.notes if where == "fuse-quantize-dequantize"]


def test_what_stays_apart_is_noted_with_its_reason() -> None:
    _, _, ctx = fused(Plain(torch.tanh), torch.randn(3, 32))
    assert "aten.tanh makes its values and cannot quantize them" in reasons(ctx)
    _, _, ctx = fused(Gated(), torch.randn(3, 32), STATIC, [torch.randn(3, 32)])
    assert reasons(ctx) == ["its range is static: quantizing is elementwise and stays its own operator"] * 2


def test_a_norm_that_something_else_reads_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = Gated().norm, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.linear(y) + y

    before, graph, ctx = fused(Shared(), torch.randn(3, 32))
    assert {"rms_norm", "quantize_activation", "integer_linear"} <= set(names(graph))
    assert any("is read by add" in reason for reason in reasons(ctx))
    assert_same_function(before, graph)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("nf4", "no matmul of int8 activations with nf4 weights: both have to be integers, or fp8"),
        ("groups", "groups of 12 and 16 columns do not nest; set group_size"),
    ],
)
def test_formats_without_a_matmul_multiply_dequantized_values(scheme: str, reason: str) -> None:
    chosen = replace(W8A8, weight=QuantFormat(NF4)) if scheme == "nf4" else W4A4.with_options(group_size=16, activation_group_size=12)
    before, graph, ctx = fused(nn.Linear(32, 8), torch.randn(3, 32), chosen)
    assert reason in reasons(ctx)
    assert "dequantize_activation" in names(graph)
    assert_same_function(before, graph)


def test_the_coverage_table_shows_activations_and_transforms() -> None:
    graph, ctx = capture(Gated(), torch.randn(3, 32)), context(W4A8)
    run_pipeline(graph, QUANTIZE, ctx)
    run_pipeline(graph, [FuseQuantizeDequantize(), FuseDequantize(), RemoveDeadCode(), LowerToKernels()], ctx)
    rows = {row.operator: (row.format, row.activation) for row in ctx.coverage}
    assert rows == {
        "add_norm_quantize": ("int8 token sym dynamic", ""),
        "integer_linear": ("int4 g64 sym fp16", "int8 token sym dynamic"),
        "gated_quantize": ("int8 token sym dynamic", ""),
    }


@pytest.mark.parametrize("scheme", [W8A8, W4A4.with_options(group_size=32, activation_group_size=32)], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_has_a_kernel_for_all_that_fuses(scheme: QuantScheme, symmetric: bool) -> None:
    """Operands, storages and options reach the kernels as the kernels declare them."""
    goal = resolve("sm90", scheme.with_options(activation_symmetric=symmetric))
    graph, ctx = load(tiny("llama")).graph, PassContext(goal, backend_for(goal))
    run_pipeline(graph, default_pipeline(goal, "nearest"), ctx)
    assert [row for row in ctx.coverage if row.reason and not row.chosen] == []
    suffix = "" if symmetric else "_asym"
    made = {f"norm_quantize{suffix}", f"add_norm_quantize{suffix}", f"gated_quantize{suffix}"}
    assert made <= {row.operator for row in ctx.coverage if row.kernel != "reference"}
    scales = {value.dtype for node in graph.calls(*PRODUCERS) for value in node.meta["val"] if value.is_floating_point()}
    assert scales == {torch.bfloat16, torch.float32} | ({torch.float16} if scheme.name == "w4a4" else set())


def test_without_fuel_nothing_is_fused() -> None:
    graph, ctx = capture(Gated(), torch.randn(3, 32)), context(W8A8)
    run_pipeline(graph, QUANTIZE, ctx)
    ctx.fuel = 0
    run_pipeline(graph, [FuseQuantizeDequantize()], ctx)
    assert "integer_linear" not in names(graph)


class Convolutions(nn.Module):
    """Strided, padded, grouped and pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.third = nn.Conv2d(8, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(nn.functional.relu6(self.second(nn.functional.relu6(self.first(x)))))


def test_convolutions_read_codes_too() -> None:
    x = torch.randn(2, 4, 9, 9)
    before, graph, _ = fused(Convolutions(), x, W8A8, [torch.randn(2, 4, 9, 9)])
    assert names(graph).count("integer_conv2d") == 3
    assert not {"dequantize_activation", "dequantize", "aten.conv2d"} & set(names(graph))
    assert_same_function(before, graph)
