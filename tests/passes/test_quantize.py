"""quantize-weights, fuse-dequantize, convert-dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import PassError, PipelineError, WeightError
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.selection import matching_pattern
from qcompile.quant.element import INT8
from qcompile.quant.reference import dequantize, quantize
from qcompile.quant.scheme import W4A16, QuantFormat
from qcompile.target import resolve
from tests.passes.helpers import Gated, assert_same_function, capture, names, run

aten = torch.ops.aten


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-int8"])
def test_the_graph_computes_with_exactly_the_rounded_weights(target: str) -> None:
    module = Gated()
    x = torch.randn(3, 32)
    graph = capture(module, x)
    run(graph, Canonicalize(), RaisePatterns())
    ctx = run(graph, QuantizeWeights(), FuseDequantize(), target=target)
    form = ctx.target.scheme.weight
    assert form is not None
    for linear in (module.gate, module.up, module.down):
        q = quantize(linear.weight.detach(), form)
        linear.weight.data = dequantize(
            q.codes, q.scale, q.zero, form.element.bits, form.granularity.group_size, linear.in_features, torch.float32
        )
    assert names(graph).count("quantized_linear") == 3
    torch.testing.assert_close(graph(x), module(x), atol=1e-5, rtol=0)


def test_fusing_changes_no_value() -> None:
    graph = capture(Gated(), torch.randn(3, 32))
    run(graph, Canonicalize(), QuantizeWeights(), target="cpu-int4")
    before = graph.clone()
    run(graph, FuseDequantize())
    assert "dequantize" not in names(graph)
    assert_same_function(before, graph)


def test_a_weight_shared_by_two_linears_is_rounded_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(torch.relu(self.first(x)))

    graph = capture(Shared(), torch.randn(2, 8))
    run(graph, Canonicalize(), QuantizeWeights(), target="cpu-int4")
    assert sorted(graph.constants) == ["first.weight.codes", "first.weight.scale"]


@pytest.mark.parametrize(("name", "patterns", "found"), [
    ("model.layers.0.mlp.down_proj.weight", ("down_proj",), "down_proj"),
    ("model.layers.0.mlp.down_proj.weight", ("mlp.down_proj",), "mlp.down_proj"),
    ("model.layers.0.mlp.down_proj.weight", ("proj",), None),
    ("lm_head.weight", ("re:.*layers.*", "lm_head"), "lm_head"),
    ("model.layers.10.q.weight", ("re:layers\\.1\\.", "re:layers\\.10\\."), "re:layers\\.10\\."),
])  # fmt: skip
def test_ignore_patterns(name: str, patterns: tuple[str, ...], found: str | None) -> None:
    assert matching_pattern(name, patterns) == found


def test_what_is_ignored_stays_float_and_is_noted() -> None:
    graph = capture(Gated(), torch.randn(3, 32))
    ctx = run(graph, Canonicalize())
    ctx.target = resolve("cpu", W4A16.with_options(ignore=("down", "re:gate")))
    assert QuantizeWeights().run(graph, ctx)
    assert [(reason, chosen) for _, _, reason, chosen in ctx.notes] == [
        ("ignored by pattern 're:gate'", True),
        ("ignored by pattern 'down'", True),
    ]
    assert sum(name.endswith(".codes") for name in graph.constants) == 1


def test_rounding_starts_from_the_checkpoint_and_not_from_the_computation_dtype() -> None:
    module = Gated()
    graph = capture(module, torch.randn(3, 32))
    run(graph, Canonicalize(), ConvertDtype(to="bf16"), QuantizeWeights(), target="cpu-int8")
    expected = quantize(module.gate.weight.detach(), QuantFormat(INT8))
    assert torch.equal(graph.constants["gate.weight.codes"].materialize(), expected.codes)


def test_nan_weights_are_refused_by_name_when_they_are_read() -> None:
    module = Gated()
    module.up.weight.data[3, 4] = float("nan")
    graph = capture(module, torch.randn(3, 32))
    run(graph, Canonicalize(), QuantizeWeights(), target="cpu-int4")
    with pytest.raises(WeightError, match=r"up.weight\[3, 4\] is nan"):
        graph(torch.randn(3, 32))


def test_an_unknown_rounding_is_refused() -> None:
    graph = capture(Gated(), torch.randn(3, 32))
    with pytest.raises(PipelineError, match=r"option rounding: expected one of nearest, mse-clip, gptq, .*got 'best'"):
        run(graph, QuantizeWeights(rounding="best"), target="cpu-int4")


class Positions(nn.Module):
    """Sines of positions beside learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.tensor([1.0, 0.01]))
        self.linear = nn.Linear(2, 2)

    def forward(self, positions: Tensor) -> Tensor:
        return self.linear(torch.sin(positions.float().unsqueeze(-1) * self.frequency))


def test_positions_stay_float32_where_the_rest_is_half() -> None:
    module = Positions()
    positions = torch.tensor([[1001, 1002], [5003, 5004]])
    graph = capture(module, positions)
    run(graph, Canonicalize(), ConvertDtype(to="bf16"))
    assert graph.constants["frequency"].dtype == torch.float32
    assert graph.constants["linear.weight"].dtype == torch.bfloat16
    result = graph(positions)
    assert result.dtype == torch.bfloat16
    assert (result.float() - module(positions)).abs().max() < 0.02


def test_a_float_input_is_cast_on_entry() -> None:
    module = Gated()
    graph = capture(module, torch.randn(3, 32))
    run(graph, Canonicalize(), ConvertDtype(to="bf16"))
    assert graph(torch.randn(5, 32)).dtype == torch.bfloat16
    assert graph.placeholders[0].meta["val"].dtype == torch.float32


def test_a_false_claim_of_a_pass_is_found() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from qcompile.ir.graph import Graph
    from qcompile.passes.base import Pass, PassContext

    @dataclass(frozen=True)
    class Liar(Pass):
        name: ClassVar[str] = "liar"

        def run(self, graph: Graph, ctx: PassContext) -> bool:
            return True

    graph = capture(Gated(), torch.randn(3, 32))
    with pytest.raises(PassError, match="liar: claims to have changed the graph, expected the claim to be true"):
        run(graph, Liar())
