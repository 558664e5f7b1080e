"""Random small graphs: a random member of every admitted kind changes nothing; where a kind is blocked, some member of it does."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from qcompile.ir.basis import Kind
from qcompile.ir.graph import Graph
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.spaces import find_spaces
from qcompile.quant.hadamard import mixing_matrix
from tests.passes.building import BATCH, TOKENS, Builder
from tests.passes.helpers import context
from tests.passes.space_cases import EXACT, changed, error_if_forced

aten, qcompile = torch.ops.aten, torch.ops.qcompile
WIDTHS = (8, 12)
UNARY = (aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.neg.default)
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

Values = list[fx.Node]
Step = Callable[[st.DataObject, Builder, Values], fx.Node]


def width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def one(data: st.DataObject, values: Values) -> fx.Node:
    return data.draw(st.sampled_from(values))


def pair(data: st.DataObject, build: Builder, values: Values) -> tuple[fx.Node, fx.Node]:
    """Two values of one width; a linear makes the second if there is none."""
    left = one(data, values)
    alike = [value for value in values if value is not left and width(value) == width(left)]
    return left, data.draw(st.sampled_from(alike)) if alike else build.linear(left, width(left))


def linear(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    return build.linear(one(data, values), data.draw(st.sampled_from(WIDTHS)), bias=data.draw(st.booleans()))


def rms_norm(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    x = one(data, values)
    gain = build.constant(width(x)) if data.draw(st.booleans()) else None
    return build.call(qcompile.rms_norm.default, x, gain, 1e-5, data.draw(st.sampled_from((0.0, 1.0))) if gain is not None else 0.0)


def layer_norm(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    x = one(data, values)
    return build.call(aten.layer_norm.default, x, [width(x)], build.constant(width(x)), build.constant(width(x)))


def unary(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    return build.call(data.draw(st.sampled_from(UNARY)), one(data, values))


def vector(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    x = one(data, values)
    target = data.draw(st.sampled_from((aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.sub.Tensor)))
    return build.call(target, x, build.constant(width(x), positive=True))


def add(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    return build.call(aten.add.Tensor, *pair(data, build, values))


def product(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    return build.call(aten.mul.Tensor, *pair(data, build, values))


def gated(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    return build.call(qcompile.gated_activation.default, *pair(data, build, values), data.draw(st.sampled_from(("silu", "relu"))))


def attention(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    heads, groups = data.draw(st.sampled_from(((2, 2), (2, 1))))
    return build.attend(one(data, values), heads, groups, 4, rotary=data.draw(st.booleans()))


def split(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    """Both halves, swapped or multiplied."""
    halves = build.call(aten.chunk.default, one(data, values), 2, -1)
    low, high = (build.call(operator.getitem, halves, place) for place in (0, 1))
    if data.draw(st.booleans()):
        return build.call(aten.cat.default, [high, low], -1)
    return build.linear(build.call(aten.mul.Tensor, build.call(aten.silu.default, low), high), 8)


def per_head(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    """A norm or a linear on each of two heads."""
    x = one(data, values)
    size = width(x) // 2
    apart = build.call(aten.reshape.default, x, [BATCH, TOKENS, 2, size])
    inner = build.linear(apart, size) if data.draw(st.booleans()) else build.call(qcompile.rms_norm.default, apart, None, 1e-5)
    return build.call(aten.reshape.default, inner, [BATCH, TOKENS, 2 * size])


def rotate(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    """A Hadamard rotation that runs, of all channels or of blocks of four."""
    x = one(data, values)
    size = data.draw(st.sampled_from((4, width(x))))
    mixing = mixing_matrix(size)
    matrix = None if mixing is None else build.graph.add_constant("mixing", mixing.double())
    return build.call(qcompile.hadamard.default, x, matrix, size)


def select(data: st.DataObject, build: Builder, values: Values) -> fx.Node:
    """Channels in another order."""
    x = one(data, values)
    order = torch.tensor(data.draw(st.one_of(st.just([*range(3, width(x)), 0, 1, 2]), st.permutations(range(width(x))))))
    return build.call(aten.index_select.default, x, -1, build.graph.add_constant("order", order))


STEPS: list[Step] = [linear, rms_norm, layer_norm, unary, vector, add, product, gated, attention, split, per_head, rotate, select]


def draw_graph(data: st.DataObject, steps: list[Step]) -> Graph:
    """A graph of four to nine random steps; linears read what nothing else does, and their results are the outputs."""
    build = Builder(6, seed=data.draw(st.integers(0, 1000)))
    values = [build.linear(build.x, size) for size in WIDTHS]
    for step in data.draw(st.lists(st.sampled_from(steps), min_size=4, max_size=9)):
        values.append(step(data, build, values))
    loose = [value for value in values if not value.users]
    return build.finish(*(build.linear(value, 3) for value in loose))


@QUICK
@given(st.data())
def test_admitted_changes_keep_the_function(data: st.DataObject) -> None:
    graph = draw_graph(data, STEPS)
    expected = outputs(graph, wide=True)
    for kind in Kind:
        clone, spaces = changed(graph, kind, seed=data.draw(st.integers(0, 100)))
        assert relative_error(outputs(clone, wide=True), expected) <= EXACT, (kind, spaces)


@QUICK
@given(st.data())
def test_blocked_kinds_have_a_counterexample(data: st.DataObject) -> None:
    """Of two factors the analysis gives the scale to one; had it chosen the other, both might do: such spaces are left out."""
    graph = draw_graph(data, STEPS)
    expected = outputs(graph, wide=True)
    for kind in Kind:
        for space in find_spaces(graph, kind, blocked=True):
            if space.blocked is not None and not all(reason.startswith("of two factors") for _, reason in space.blockers):
                assert error_if_forced(graph, space, expected) > EXACT, (kind, space)


@QUICK
@given(st.data())
def test_folding_norms_keeps_the_function(data: st.DataObject) -> None:
    graph = draw_graph(data, [linear, rms_norm, layer_norm, add, gated, attention])
    clone = graph.clone()
    FoldNorms(untie=data.draw(st.booleans())).run(clone, context())
    clone.verify()
    assert relative_error(outputs(clone, wide=True), outputs(graph, wide=True)) <= EXACT
    after, _ = changed(clone, Kind.ORTHOGONAL)
    assert relative_error(outputs(after, wide=True), outputs(graph, wide=True)) <= EXACT


@pytest.mark.parametrize("kind", list(Kind))
def test_a_chain_of_linears_admits_everything(kind: Kind) -> None:
    """The properties above are not kept by admitting nothing."""
    build = Builder(6)
    graph = build.finish(build.linear(build.linear(build.linear(build.x, 8), 12), 3))
    assert [space.size for space in find_spaces(graph, kind)] == [8, 12]
