"""The rules of single operators: what each lets pass keeps the function, what it stops would not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx

from qcompile.ir.basis import Kind
from qcompile.ir.graph import Graph
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.space_system import Layouts, System
from qcompile.passes.spaces import DEFAULT_RULES, find_spaces
from qcompile.quant.element import INT8
from qcompile.quant.format import QuantFormat
from qcompile.quant.hadamard import mixing_matrix
from qcompile.quant.reference import quantize
from tests.passes.building import BATCH, TOKENS, Builder
from tests.passes.space_cases import EXACT, changed, error_if_forced

aten, qcompile = torch.ops.aten, torch.ops.qcompile
P, S, D, O, I = Kind  # noqa: E741
Make = Callable[[Builder, fx.Node], fx.Node]


def between(make: Make, width: int = 12) -> Graph:
    """`linear(make(linear(x)))`: what passes through `make` shows in the space that its result is read from."""
    build = Builder(7)
    inside = build.linear(build.x, width)
    return build.finish(build.linear(make(build, inside), 5))


def admitted(graph: Graph, what: str = "reads") -> set[Kind]:
    """The kinds under which the last linear's operand, or else the first linear's result, may change by more than the identity."""
    linears = graph.calls(aten.linear.default)
    return {
        kind
        for kind in Kind
        for space in find_spaces(graph, kind)
        if (linears[-1] in space.readers if what == "reads" else linears[0] in space.writers)
    }


def unary(target: Any, *args: Any) -> Make:
    return lambda build, x: build.call(target, x, *args)


def with_vector(target: Any, *, positive: bool = False) -> Make:
    return lambda build, x: build.call(target, x, build.constant(12, positive=positive))


def per_token(target: Any) -> Make:
    return lambda build, x: build.call(target, x, build.call(aten.sigmoid.default, build.linear(build.x, 1)))


def two_branches(target: Any) -> Make:
    return lambda build, x: build.call(target, x, build.linear(build.x, 12))


def norm(*, gain: bool, offset: float = 0.0) -> Make:
    return lambda build, x: build.call(qcompile.rms_norm.default, x, build.constant(12) if gain else None, 1e-5, offset)


def layer_norm(*, gain: bool) -> Make:
    return lambda build, x: build.call(aten.layer_norm.default, x, [12], *([build.constant(12), build.constant(12)] if gain else []))


def gate(activation: str) -> Make:
    return lambda build, x: build.call(qcompile.gated_activation.default, build.linear(build.x, 12), x, activation)


def over_tokens(target: Any, *args: Any, width: int = 12, **options: Any) -> Make:
    """A convolution or pooling over tokens, channels in front."""

    def make(build: Builder, x: fx.Node) -> fx.Node:
        turned = build.call(aten.transpose.int, x, 1, 2)
        operands = [build.constant(*item) if isinstance(item, tuple) else item for item in args]
        return build.call(aten.transpose.int, build.call(target, turned, *operands, **options), 1, 2)

    del width
    return make


def batch_norm(build: Builder, x: fx.Node) -> fx.Node:
    turned = build.call(aten.transpose.int, x, 1, 2)
    vectors = [build.constant(12, positive=positive) for positive in (False, False, False, True)]
    return build.call(aten.transpose.int, build.call(aten.batch_norm.default, turned, *vectors, False, 0.1, 1e-5, False), 1, 2)


def swapped_halves(build: Builder, x: fx.Node) -> fx.Node:
    halves = build.call(aten.chunk.default, x, 2, -1)
    low, high = (build.call(operator.getitem, halves, place) for place in (0, 1))
    return build.call(aten.cat.default, [high, low], -1)


def heads(make: Make) -> Make:
    """The same on [B, S, 3, 4]."""

    def wrapped(build: Builder, x: fx.Node) -> fx.Node:
        apart = build.call(aten.reshape.default, x, [BATCH, TOKENS, 3, 4])
        return build.call(aten.reshape.default, make(build, apart), [BATCH, TOKENS, 12])

    return wrapped


def rotated(size: int) -> Make:
    """A Hadamard rotation of blocks of `size` channels that runs."""

    def make(build: Builder, x: fx.Node) -> fx.Node:
        mixing = mixing_matrix(size)
        matrix = None if mixing is None else build.graph.add_constant("mixing", mixing.double())
        return build.call(qcompile.hadamard.default, x, matrix, size)

    return make


def selected(order: torch.Tensor, axis: int = -1) -> Make:
    return lambda build, x: build.call(aten.index_select.default, x, axis, build.graph.add_constant("order", order))


def packed_linear(build: Builder, x: fx.Node) -> fx.Node:
    """A linear whose weight is quantized."""
    packed = quantize(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)), QuantFormat(INT8))
    parts = [build.graph.add_constant(name, part) for name, part in (("codes", packed.codes), ("scale", packed.scale))]
    weight = build.call(qcompile.dequantize.default, *parts, None, 8, -1, 12, torch.float64)
    return build.call(aten.linear.default, x, weight)


ALL = {P, S, D, O, I}
PASSING: list[tuple[str, Make, set[Kind]]] = [
    ("nothing", lambda _, x: x, ALL),
    ("gelu", unary(aten.gelu.default), {P}),
    ("relu", unary(aten.relu.default), {P, D}),
    ("relu6", unary(aten.relu6.default), {P}),
    ("hardswish", unary(aten.hardswish.default), {P}),
    ("abs", unary(aten.abs.default), {P, D}),
    ("tanh", unary(aten.tanh.default), {P, S}),
    ("neg", unary(aten.neg.default), ALL),
    ("times a number", unary(aten.mul.Tensor, 3.0), ALL),
    ("plus a number", unary(aten.add.Tensor, 3.0), {P}),
    ("softmax", unary(aten.softmax.int, -1), {P}),
    ("plus a vector", with_vector(aten.add.Tensor), ALL),
    ("times a vector", with_vector(aten.mul.Tensor), {P, S, D}),
    ("divided by a vector", with_vector(aten.div.Tensor, positive=True), {P, S, D}),
    ("times a gate per token", per_token(aten.mul.Tensor), ALL),
    ("divided per token", per_token(aten.div.Tensor), ALL),
    ("plus a number per token", per_token(aten.add.Tensor), {P}),
    ("plus a branch", two_branches(aten.add.Tensor), ALL),
    ("less a branch", two_branches(aten.sub.Tensor), ALL),
    ("times a branch", two_branches(aten.mul.Tensor), {P, S, D}),
    ("gated by silu", gate("silu"), {P, S, D}),
    ("gated by relu", gate("relu"), {P, S, D}),
    ("rms norm", norm(gain=False), {P, S, O}),
    ("rms norm with a gain", norm(gain=True), {P, S, D}),
    ("rms norm with an offset gain", norm(gain=True, offset=1.0), {P, S, D}),
    ("layer norm", layer_norm(gain=False), {P}),
    ("layer norm with a gain", layer_norm(gain=True), {P, D}),
    ("swapped halves", swapped_halves, ALL),
    ("norm per head", heads(lambda build, x: build.call(qcompile.rms_norm.default, x, None, 1e-5)), {P, S, O}),
    ("norm per head with a gain", heads(lambda build, x: build.call(qcompile.rms_norm.default, x, build.constant(4), 1e-5)), {P, S, D}),
    ("product per head", heads(lambda build, x: build.linear(x, 4)), ALL),
    ("convolution", over_tokens(aten.conv1d.default, (12, 12, 3), (12,), [1], [1]), ALL),
    ("grouped convolution", over_tokens(aten.conv1d.default, (12, 4, 3), (12,), [1], [1], [1], 3), ALL),
    ("depthwise convolution", over_tokens(aten.conv1d.default, (12, 1, 3), (12,), [1], [1], [1], 12), {P, S, D}),
    ("batch norm", batch_norm, {P, D}),
    ("mean over tokens", lambda build, x: build.call(aten.mean.dim, x, [1], True), ALL),
    ("maximum over tokens", lambda build, x: build.call(aten.amax.default, x, [1], True), {P, D}),
    ("pooling", over_tokens(aten.max_pool1d.default, [2]), {P, D}),
    ("padding", over_tokens(aten.constant_pad_nd.default, [1, 1]), ALL),
    ("masked rows", lambda build, x: build.call(
        aten.masked_fill.Scalar, x, build.graph.add_constant("mask", torch.tensor([[True], [False], [True], [False], [True]])), 0.0), ALL),
    ("last token", lambda build, x: build.call(
        qcompile.gather_last.default, x, build.graph.add_constant("positions", torch.arange(TOKENS).repeat(BATCH, 1))), ALL),
    ("channels by a list", lambda build, x: build.call(
        aten.index.Tensor, x, [None, None, build.graph.add_constant("order", torch.arange(12).roll(5))]), ALL),
    ("channels in another order", selected(torch.arange(12).roll(5)), ALL),
    ("channels in any order", selected(torch.tensor([5, 2, 9, 0, 7, 4, 11, 1, 8, 3, 10, 6], dtype=torch.int32)), {S, D}),
    ("some channels, some twice", selected(torch.tensor([3, 4, 5, 4, 3]), 2), {S, D}),
    ("tokens in another order", selected(torch.tensor([4, 0, 0, 2, 1]), 1), ALL),
    ("channels by their sums", lambda build, x: build.call(aten.index_select.default, x, -1, build.call(
        operator.getitem, build.call(aten.topk.default, build.call(aten.sum.dim_IntList, x, [0, 1]), 12), 1)), set()),
    ("rotated", rotated(12), set()),
    ("rotated in blocks", rotated(4), set()),
    ("quantized weights", packed_linear, set()),
    ("every third channel", lambda build, x: build.call(aten.slice.Tensor, x, 2, 0, 12, 3), {S, D}),
    ("interleaved", lambda build, x: build.call(aten.reshape.default, build.call(
        aten.transpose.int, build.call(aten.reshape.default, x, [BATCH, TOKENS, 3, 4]), 2, 3), [BATCH, TOKENS, 12]), {S, D}),
    ("repeated heads", lambda build, x: build.call(aten.reshape.default, build.call(aten.expand.default, build.call(
        aten.unsqueeze.default, build.call(aten.reshape.default, x, [BATCH, TOKENS, 3, 4]), 3), [BATCH, TOKENS, 3, 2, 4]),
        [BATCH, TOKENS, 24]), ALL),
    ("attention", lambda build, x: build.attend(x, 4, 2, 4), ALL),
    ("unknown", unary(aten.cumsum.default, 1), set()),
    ("sorted", lambda build, x: build.call(operator.getitem, build.call(aten.sort.default, x), 0), set()),
    ("rounded to integers", lambda build, x: build.call(
        aten.to.dtype, build.call(aten.to.dtype, x, torch.int64), torch.float64), set()),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kinds"), [case[1:] for case in PASSING], ids=[case[0] for case in PASSING])
def test_what_each_operator_lets_pass(make: Make, kinds: set[Kind]) -> None:
    graph = between(make)
    assert admitted(graph) == kinds
    expected = outputs(graph, wide=True)
    for kind in Kind:
        assert relative_error(outputs(changed(graph, kind)[0], wide=True), expected) <= EXACT, kind
        for space in find_spaces(graph, kind, blocked=True):
            if space.blocked is not None and "unknown" not in space.blocked[1]:
                assert error_if_forced(graph, space, expected) > EXACT, space


@pytest.mark.parametrize("kind", list(Kind))
def test_a_rotation_that_runs_says_why_nothing_passes(kind: Kind) -> None:
    blocked = [space.blocked for space in find_spaces(between(rotated(4)), kind, blocked=True)]
    assert ("hadamard", "mixes channels while the graph runs: a map would come out as another") in blocked


def test_quantized_weights_say_why_nothing_moves() -> None:
    blocked = [space.blocked for space in find_spaces(between(packed_linear), O, blocked=True)]
    assert blocked[0] == ("linear_1", "its weight is quantized: change bases before")


def test_positions_pass_planes() -> None:
    """Planes in another order with their frequencies, scales and signs equal on both halves; no rotation."""
    build = Builder(8)
    graph = build.finish(build.linear(build.attend(build.x, 4, 2, 8, rotary=True), 3))
    first = graph.calls(aten.linear.default)[0]
    shapes = {kind: [(s.blocks, s.block_size) for s in find_spaces(graph, kind) if first in s.writers] for kind in Kind}
    assert shapes == {P: [(1, 4)], S: [(2, 4)], D: [(2, 4)], O: [], I: []}
    for kind in Kind:
        assert relative_error(outputs(changed(graph, kind)[0], wide=True), outputs(graph, wide=True)) <= EXACT


def test_a_constant_read_in_two_ways_keeps_what_both_allow() -> None:
    """The matrix of a linear is also summed along its rows: its columns may come in another order, its rows stay."""
    build = Builder(6)
    weight = build.constant(12, 8)
    hidden = build.call(aten.linear.default, build.linear(build.x, 8), weight)
    graph = build.finish(build.linear(hidden, 4), build.call(aten.sum.dim_IntList, weight, [1]))
    assert {kind: [space.size for space in find_spaces(graph, kind)] for kind in Kind} == {P: [8], S: [], D: [], O: [], I: []}
    (rows,) = (space for space in find_spaces(graph, P, blocked=True) if space.size == 12)
    assert rows.blocked == ("sum_1", "reads constant along other axes too")
    assert relative_error(outputs(changed(graph, P)[0], wide=True), outputs(graph, wide=True)) <= EXACT


def test_what_is_written_and_read_alike_is_its_own_dual() -> None:
    """Rows of a table against rows of the same table: turned alike their products stay, scaled alike they do not."""
    build = Builder(6)
    table = build.constant(9, 8)
    rows = build.call(aten.embedding.default, table, build.graph.add_constant("ids", torch.arange(5).repeat(2, 1)))
    graph = build.finish(build.call(aten.linear.default, rows, table), build.linear(build.x, 2))
    found = {kind: [space.blocked for space in find_spaces(graph, kind, blocked=True) if space.size == 8] for kind in Kind}
    contradiction = ("linear", "ties the space to its own dual: what is written there is also read")
    assert found == {P: [None], S: [None], D: [contradiction], O: [None], I: [contradiction]}
    for kind in Kind:
        assert relative_error(outputs(changed(graph, kind)[0], wide=True), outputs(graph, wide=True)) <= EXACT


def test_a_rule_of_ones_own() -> None:
    """`rules` teaches the analysis an operator; without one it is left alone."""

    def cumulative(system: System, node: fx.Node) -> Layouts:
        return system.value(node.args[0])  # sums over tokens mix no channels

    graph = between(unary(aten.cumsum.default, 1))
    rules = DEFAULT_RULES | {aten.cumsum.default: cumulative}
    assert find_spaces(graph, O) == []
    (space,) = find_spaces(graph, O, rules=rules)
    assert (space.size, [node.name for node in space.values[0].node.users]) == (12, ["cumsum"])
    blocked = next(space for space in find_spaces(graph, O, blocked=True) if space.size == 12)
    assert blocked.blocked == ("cumsum", "operator aten.cumsum is unknown to the rules")


def test_experts_have_an_order_each() -> None:
    build = Builder(8)
    rows = build.call(aten.reshape.default, build.linear(build.x, 8), [BATCH * TOKENS, 8])
    router = build.call(aten.softmax.int, build.linear(rows, 3), -1)
    chosen = build.call(aten.topk.default, router, 2)
    weights, indices = (build.call(operator.getitem, chosen, place) for place in (0, 1))
    experts = partial(build.call, qcompile.moe_experts.default, rows, indices, weights)
    graph = build.finish(build.linear(experts(build.constant(3, 12, 8), build.constant(3, 8, 6), "silu"), 4))
    assert {(space.blocks, space.block_size) for space in find_spaces(graph, P)} == {(1, 8), (3, 6)}
    for kind in Kind:
        assert relative_error(outputs(changed(graph, kind)[0], wide=True), outputs(graph, wide=True)) <= EXACT
