"""quantize-activations: what is quantized, once, in which format, with which range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile.errors import PipelineError, SourceError
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets
from qcompile.passes.base import PassContext
from qcompile.passes.calibration import make_calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.manager import run_pipeline
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.quant import activations
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.scheme import FP8_DYNAMIC, W4A4, W4A8, W4A16, W8A8, QuantScheme
from qcompile.quant.static_range import static_range
from qcompile.target import resolve
from tests.passes.helpers import Gated, capture, names

aten = torch.ops.aten
ops = torch.ops.qcompile
STATIC = W8A8.with_options(activation_static=True)


def context(scheme: QuantScheme, data: list[Tensor] | None = None) -> PassContext:
    """A context for the scheme, with calibration inputs if there are some."""
    calibration = None if data is None else make_calibration([(item,) for item in data], Assets())
    return PassContext(resolve("cpu", scheme), calibration=calibration)


def quantized(
    scheme: QuantScheme, module: nn.Module, x: Tensor, data: list[Tensor] | None = None, **options: Any
) -> tuple[Graph, PassContext]:
    """The module's graph with weights and activations quantized."""
    graph, ctx = capture(module, x), context(scheme, data)
    run_pipeline(graph, [Canonicalize(), RaisePatterns(), QuantizeActivations(**options), QuantizeWeights()], ctx)
    return graph, ctx


def with_rounded_inputs(graph: Graph, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The graph's result when what its linears and convolutions read is rounded."""
    values: dict[fx.Node, Any] = {graph.placeholders[0]: x}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = graph.constants[str(node.target)].materialize()
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
            if node.target in (aten.linear.default, aten.conv2d.default):
                args = (rounded(args[0]), *args[1:])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result: Tensor = values[graph.output.args[0][0]]  # type: ignore[index]
    return result


def rounding(form: ActivationFormat) -> Callable[[Tensor], Tensor]:
    """Quantize and dequantize in a dynamic format."""
    bits, kind, wanted = form.element.bits, form.element.kind, form.granularity.group_size

    def apply(x: Tensor) -> Tensor:
        size = -1 if wanted >= x.shape[-1] else wanted
        if form.symmetric:
            return activations.dequantize(*activations.quantize(x, bits, size, kind), None, size, torch.float32)
        return activations.dequantize(*activations.quantize_asymmetric(x, bits, size), size, torch.float32)

    return apply


@pytest.mark.parametrize(
    "scheme",
    [W8A8, W4A8, W4A4.with_options(activation_group_size=16), FP8_DYNAMIC, W8A8.with_options(activation_symmetric=False)],
    ids=lambda scheme: str(scheme.activation),
)
def test_linears_read_rounded_activations(scheme: QuantScheme) -> None:
    module, x = Gated(), torch.randn(3, 32)
    graph, ctx = quantized(scheme, module, x)
    weights_alone = capture(module, x)
    run_pipeline(weights_alone, [Canonicalize(), RaisePatterns(), QuantizeWeights()], ctx)
    assert scheme.activation is not None
    torch.testing.assert_close(graph(x), with_rounded_inputs(weights_alone, x, rounding(scheme.activation)), atol=1e-5, rtol=0)


def test_siblings_share_one_pair() -> None:
    graph, _ = quantized(W8A8, Gated(), torch.randn(3, 32))
    assert names(graph).count("quantize_activation") == 2  # gate and up read one, down the other


def test_after_the_weights_it_quantizes_the_same_values() -> None:
    module, x = Gated(), torch.randn(3, 32)
    before, _ = quantized(W8A8, module, x)
    after = capture(module, x)
    run_pipeline(after, [Canonicalize(), RaisePatterns(), QuantizeWeights(), QuantizeActivations()], context(W8A8))
    assert torch.equal(before(x), after(x))


def test_what_the_scheme_leaves_alone_reads_floats() -> None:
    graph, _ = quantized(W8A8.with_options(ignore=("down",)), Gated(), torch.randn(3, 32))
    assert names(graph).count("quantize_activation") == 1
    untouched, _ = quantized(W4A16, Gated(), torch.randn(3, 32))
    assert "quantize_activation" not in names(untouched)


@pytest.mark.parametrize("ranges", ["max", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_come_from_the_data(ranges: str, symmetric: bool) -> None:
    module, x = Gated(), torch.randn(3, 32)
    data = [torch.randn(4, 32) for _ in range(3)]
    scheme = STATIC.with_options(activation_symmetric=symmetric)
    graph, _ = quantized(scheme, module, x, data, ranges=ranges)
    first = graph.calls(ops.quantize_static.default)[0]
    float_graph = capture(module, x)
    run_pipeline(float_graph, [Canonicalize(), RaisePatterns()], context(scheme))
    normed = torch.cat([run_to(float_graph, str(first.args[0]), item) for item in data])
    assert scheme.activation is not None
    scale, zero = static_range(normed, scheme.activation, ranges)
    stored = [None if part is None else graph.constant(part) for part in first.args[1:3]]
    assert stored[0] is not None
    torch.testing.assert_close(stored[0].materialize(), scale)
    assert (stored[1] is None) == symmetric
    if stored[1] is not None:
        assert torch.equal(stored[1].materialize(), zero)


def run_to(graph: Graph, name: str, x: Tensor) -> Tensor:
    """The value called `name`."""
    values: dict[fx.Node, Any] = {graph.placeholders[0]: x}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = graph.constants[str(node.target)].materialize()
        elif node.op == "call_function":
            values[node] = node.target(*fx.node.map_arg(node.args, lambda item: values[item]), **node.kwargs)  # type: ignore[operator]
        if node.name == name:
            break
    result: Tensor = values[node]
    return result


def test_static_formats_need_data() -> None:
    with pytest.raises(SourceError, match="calibration"):
        quantized(STATIC, Gated(), torch.randn(3, 32))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 4, 1))


def test_convolutions_get_static_ranges_even_in_a_dynamic_scheme() -> None:
    x = torch.randn(2, 3, 8, 8)
    graph, _ = quantized(W8A8, convolutions(), x, [torch.randn(2, 3, 8, 8) for _ in range(3)])
    assert names(graph).count("quantize_static") == 2
    expected = capture(convolutions(), x)
    assert graph(x).shape == expected(x).shape
    second = graph.calls(ops.quantize_static.default)[1]
    zero = graph.constant(second.args[2])
    assert zero is not None
    assert zero.materialize().tolist() == [-128]  # after a ReLU nothing is below 0


def test_static_ranges_reach_to_extremes_that_a_sample_misses() -> None:
    sample = torch.zeros(2, 3, 8, 8)
    sample[0, 0, 0, :2] = torch.tensor([-100.0, 155.0])
    graph, _ = quantized(W8A8, convolutions(), torch.randn(2, 3, 8, 8), [sample], ranges="max", samples=4)
    scale = graph.constant(graph.calls(ops.quantize_static.default)[0].args[1])
    assert scale is not None
    assert scale.materialize().item() == pytest.approx(1.0)


def test_convolutions_without_data_stay_and_say_so() -> None:
    graph, ctx = quantized(W8A8, convolutions(), torch.randn(2, 3, 8, 8))
    assert "quantize_static" not in names(graph)
    assert [reason for where, _, reason, _ in ctx.notes if where == "quantize-activations"] == [
        "the range of its input is not known; give calibration="
    ] * 2


def test_an_unknown_way_to_choose_ranges_is_refused() -> None:
    with pytest.raises(PipelineError, match="option ranges: expected one of max, percentile, mse, got 'best'"):
        quantized(STATIC, Gated(), torch.randn(3, 32), [torch.randn(3, 32)], ranges="best")
