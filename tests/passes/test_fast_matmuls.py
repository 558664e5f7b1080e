"""fast-matmuls: int8 activations in front of integer weights, which stay what they are with float activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import CoverageError, FormatError, OptionError
from qcompile.ir.graph import fake_value
from qcompile.ir.matmuls import matmul_text
from qcompile.ir.records import CoverageRow
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fast_matmuls import FastMatmuls
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.fuse_quantize_dequantize import FuseQuantizeDequantize
from qcompile.passes.fuse_residual_norm import FuseResidualNorm
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.quant.activations import dequantize, quantize
from qcompile.quant.scheme import NF4A16, W4A16, W8A8, W8A16, QuantScheme
from tests.models import tiny
from tests.passes.helpers import Gated, assert_same_function, capture, names, run

ops = torch.ops.qcompile
IDS = torch.arange(3, 23).view(2, 10)


@pytest.mark.parametrize(("options", "group"), [
    ({"group_size": 16}, 16), ({"group_size": -1}, 32), ({"weight_format": "int4 g16 min fp16"}, 16),
    ({"weight_format": "int3 g32 asym int8/2", "engine": "torch_cpu"}, 32),
])  # fmt: skip
def test_every_integer_weight_meets_codes_and_stays_what_it_is(options: dict[str, Any], group: int) -> None:
    exact = qcompile.compile(tiny("llama"), "cpu-int4", recipe="nearest", **options)
    fast = qcompile.compile(tiny("llama"), "cpu-int4", recipe="nearest", strict=True, matmul="fast", **options)
    linears = fast.graph.calls(ops.integer_linear.default)
    assert len(linears) == len(exact.graph.calls(ops.quantized_linear.default)) >= 14
    assert not fast.graph.calls(ops.quantized_linear.default, ops.dequantize_activation.default)
    # Along fewer columns than a group has, the whole token shares a scale.
    assert {node.args[7] for node in linears} <= {group, -1}
    assert set(fast.graph.constants) == set(exact.graph.constants)
    for name, constant in exact.graph.constants.items():
        assert fast.graph.constants[name].key == constant.key
    left, right = (model(IDS)["logits"] for model in (exact, fast))
    # Two layers of activations of 8 bits; what one value in 127 of its group's largest can do.
    assert 1e-5 < float((left - right).abs().max() / left.abs().max()) < 0.05


def test_what_reads_one_value_shares_its_codes_and_producers_make_them() -> None:
    """q, k and v read one normed value, gate and up another."""
    graph = qcompile.compile(tiny("llama"), "cpu-int4", recipe="nearest", group_size=16, matmul="fast").graph
    made = [name for name in names(graph) if "quantize" in name and name != "dequantize"]
    layers = ["quantize_activation", "add_norm_quantize", "gated_quantize", "add_norm_quantize"]
    assert made[:8] == ["norm_quantize", *layers, *layers[:3]]


def test_fused_or_not_the_values_are_those_of_rounded_activations() -> None:
    x, scheme = torch.randn(3, 32), QuantScheme("test", weight=W4A16.with_options(group_size=16).weight)
    graph = capture(Gated(), x)
    ctx = run(graph, Canonicalize(), RaisePatterns())
    ctx.target = type(ctx.target)("cpu", scheme)
    assert QuantizeWeights().run(graph, ctx)
    assert FastMatmuls().run(graph, ctx)
    before = graph.clone()
    for step in (FuseResidualNorm(), FuseQuantizeDequantize(), FuseDequantize(), RemoveDeadCode()):
        step.run(graph, ctx)
    assert names(graph).count("integer_linear") == 3
    assert_same_function(before, graph)


class Wide(nn.Module):
    """One linear of 40 columns, and one whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(40, 24), nn.Parameter(torch.randn(8, 24))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.mix * 2.0 + x.sum())


def test_the_product_is_that_of_codes_in_groups_of_the_weight() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(40, 24), torch.randn(5, 40)
    compiled = qcompile.compile(module, "cpu-int8", example_inputs=(x,), recipe="nearest", matmul="fast")
    parts = [compiled.graph.constants[f"weight.{part}"].materialize() for part in ("codes", "scale")]
    weight = (parts[0].float() - 128) * parts[1].float()
    codes, scale = quantize(x, 8, 32)
    assert scale.shape == (5, 2)  # a shorter last group has its own
    expected = dequantize(codes, scale, None, 32, torch.float32) @ weight.t() + module.bias
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_without_an_integer_matmul_keep_the_floats_and_say_so() -> None:
    graph = capture(Wide(), torch.randn(5, 40))
    ctx = run(graph, Canonicalize())
    ctx.target = type(ctx.target)("cpu", NF4A16)
    assert QuantizeWeights().run(graph, ctx)
    ctx.notes.clear()
    assert not FastMatmuls().run(graph, ctx)
    assert [(where, reason, chosen) for where, _, reason, chosen in ctx.notes] == [
        ("fast-matmuls", "there is no integer matmul with nf4 weights: it reads floats", False)
    ]
    assert not graph.calls(ops.quantize_activation.default)


def test_scales_of_two_levels_have_no_cpp_kernel_and_strict_says_so() -> None:
    """Torch multiplies the codes, which `engine="torch_cpu"` asks for."""
    options: dict[str, Any] = {"recipe": "nearest", "matmul": "fast", "weight_format": "int3 g32 asym int8/2"}
    module, x = nn.Linear(64, 24), torch.randn(5, 64)
    reason = "the weight's codes are int3 g32 asym int8/2: expected int2 to int8 with scales of bf16 or fp16 or fp32"
    with pytest.raises(CoverageError, match=f"integer_linear weight: refused by native: .*{reason}"):
        qcompile.compile(module, "cpu-int4", example_inputs=(x,), strict=True, **options)
    qcompile.compile(module, "cpu-int4", example_inputs=(x,), strict=True, engine="torch_cpu", **options)


def test_fuel_stops_it() -> None:
    graph = capture(Gated(), torch.randn(3, 32))
    ctx = run(graph, Canonicalize())
    ctx.target = type(ctx.target)("cpu", W4A16)
    QuantizeWeights().run(graph, ctx)
    ctx.fuel = 1
    assert FastMatmuls().run(graph, ctx)
    pairs = graph.calls(ops.quantize_activation.default)
    assert [tuple(fake_value(node.args[0]).shape)[-1] for node in pairs] == [32]


def test_an_artifact_says_how_it_multiplies(tmp_path: Path) -> None:
    """The head has scales along 32 columns, all that there are: what it reads has one for a token."""
    model = tiny("llama")
    fast = "fast (int8 activations per group of 16) in 14 of 15 linears, fast (int8 activations per token) in 1 of 15 linears"
    for matmul, text in (("exact", "exact (float32 activations)"), ("fast", fast)):
        compiled = qcompile.compile(model, "cpu-int4", recipe="nearest", group_size=16, matmul=matmul)
        compiled.save(tmp_path / matmul)
        assert json.loads((tmp_path / matmul / "manifest.json").read_text())["matmul"] == text
        back = qcompile.load(tmp_path / matmul)
        assert back.matmul == compiled.matmul == text
        assert text in compiled.report()
        assert torch.equal(back(IDS)["logits"], compiled(IDS)["logits"])
        activations = {row.activation for row in back.coverage if row.weight.endswith("q_proj.weight")}
        assert activations == {"" if matmul == "exact" else "int8 g16 sym dynamic"}


def test_a_line_for_every_kind_of_matmul() -> None:
    def row(operator: str, activation: str = "") -> CoverageRow:
        return CoverageRow("n", operator, "w", "int4 g32 sym fp16", "k", "", "", activation=activation)

    assert matmul_text([], "cpu-int4") is None
    assert matmul_text([row("aten.linear"), row("quantized_embedding")], "cpu-int4") is None
    assert matmul_text([row("quantized_linear")] * 2, "sm90-int4") == "exact (bfloat16 activations)"
    assert matmul_text([row("integer_linear", "int8 token sym dynamic")], "cpu-w8a8") == "fast (int8 activations per token)"
    mixed = [row("quantized_linear"), *[row("integer_linear", "int8 g32 sym dynamic")] * 2]
    assert matmul_text(mixed, "cpu-int4") == (
        "fast (int8 activations per group of 32) in 2 of 3 linears, exact (float32 activations) in 1 of 3 linears"
    )


def test_schemes_without_fast_matmuls_are_refused() -> None:
    assert W8A16.with_options(matmul="fast").matmul == "fast"
    with pytest.raises(OptionError, match="matmul=1: expected 'exact' or 'fast'"):
        W8A16.with_options(matmul=1)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="matmul='quick': expected one of exact, fast"):
        W8A16.with_options(matmul="quick")
    with pytest.raises(FormatError, match="scheme w8a8: expected float activations for matmul='fast', got int8 token sym dynamic; leave"):
        W8A8.with_options(matmul="fast")
    with pytest.raises(FormatError, match="scheme nf4: expected integer weights for matmul='fast', got weights in nf4 g64 sym fp16"):
        NF4A16.with_options(matmul="fast")
    with pytest.raises(
        FormatError, match="scheme fp32: expected integer weights for matmul='fast', got float weights; choose int8 or int4"
    ):
        QuantScheme("fp32", matmul="fast")
