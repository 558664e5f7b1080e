"""Sizes, structures, constants, the matcher: the small parts of the representation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import fx

from qcompile.errors import ArtifactError, QCompileError, UnboundConstantError
from qcompile.ir import size
from qcompile.ir.constants import (
    Cast,
    Constant,
    Permute,
    Reshape,
    SafetensorsSource,
    UnboundSource,
    rounded_constants,
    tensor_constant,
    uncast,
)
from qcompile.ir.matcher import Either, Var, call, first_match
from qcompile.ir.structure import flatten, template_of, unflatten
from qcompile.quant.element import INT4
from qcompile.quant.granularity import Granularity
from qcompile.quant.reference import quantize
from qcompile.quant.scheme import QuantFormat

aten = torch.ops.aten


def test_size_expressions_evaluate_print_and_survive_json() -> None:
    expression = ("mul", ("ceildiv", "sequence", 16), ("add", "batch", 1))
    assert size.evaluate(expression, {"sequence": 33, "batch": 2}) == 9
    assert size.text(expression) == "(ceildiv(sequence, 16)*(batch+1))"
    assert size.from_json([["mul"][0], ["ceildiv", "sequence", 16], ["add", "batch", 1]]) == expression


@pytest.mark.parametrize(
    ("expression", "message"),
    [("rows", "unknown name 'rows'"), (("exec", 1, 2), "expected .operator, left, right."), (True, "expected an integer")],
)
def test_size_expressions_refuse_what_they_do_not_know(expression: size.Size, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        size.evaluate(expression, {"batch": 1})


def test_structures_put_leaves_back_where_they_were() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    tree = {"x": [a, (b, None)], "n": 3, "y": c}
    template, leaves = template_of(tree)
    assert [leaf.item() for leaf in leaves] == [0, 1, 2]
    assert unflatten(template, leaves) == tree
    assert [leaf.item() for leaf in flatten(template, tree)] == [0, 1, 2]


@pytest.mark.parametrize(("tree", "message"), [
    ({"x": [torch.zeros(1)], "n": 4}, r"input.n: expected 3 \(fixed when the model was traced\), got 4"),
    ({"x": [torch.zeros(1), torch.zeros(1)], "n": 3}, r"input.x: expected 1 values, got 2 values"),
    ({"x": [1.5], "n": 3}, r"input.x\[0\]: expected a tensor, got float"),
    ({"n": 3}, r"input: expected the keys \['n', 'x'\], got \['n'\]"),
])  # fmt: skip
def test_structures_name_the_place_of_a_difference(tree: object, message: str) -> None:
    template, _ = template_of({"x": [torch.zeros(1)], "n": 3})
    with pytest.raises(QCompileError, match=message):
        flatten(template, tree)


def test_a_constant_is_read_through_its_log(tmp_path: Path) -> None:
    tensor = torch.arange(6).view(2, 3).to(torch.bfloat16)
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    constant = Constant(SafetensorsSource(tmp_path / "m.safetensors", "w", (2, 3), torch.bfloat16))
    turned = constant.then(Permute((1, 0))).then(Reshape((6,))).then(Cast(torch.float32))
    assert turned.shape == (6,)
    assert turned.dtype == torch.float32
    assert turned.nbytes == 24
    assert turned.key == "safetensors:m.safetensors:w|permute(1, 0)|reshape(6,)|cast(fp32)"
    assert torch.equal(turned.materialize(), tensor.t().reshape(6).float())
    assert uncast(turned).dtype == torch.bfloat16


def test_an_unbound_constant_has_a_shape_and_no_value() -> None:
    constant = Constant(UnboundSource("w", (4, 4), torch.float32))
    assert not constant.is_bound
    assert constant.then(Permute((1, 0))).shape == (4, 4)
    with pytest.raises(UnboundConstantError, match="w: expected a value, got none: the model was traced from its configuration alone"):
        constant.materialize()


def test_codes_scale_and_zero_come_from_one_rounding() -> None:
    form = QuantFormat(INT4, Granularity(16), symmetric=False)
    reads = []

    class Counting:
        shape, dtype, key = (3, 40), torch.float32, "counting"

        def load(self) -> torch.Tensor:
            reads.append(1)
            return torch.randn(3, 40, generator=torch.Generator().manual_seed(1))

    parts = rounded_constants(Constant(Counting()), form, "w")
    expected = quantize(Counting().load(), form)
    reads.clear()
    for name, constant in parts.items():
        tensor = constant.materialize()
        assert torch.equal(tensor, getattr(expected, name))
        assert tuple(tensor.shape) == constant.shape
        assert tensor.dtype == constant.dtype
    assert len(reads) == 1
    assert tensor_constant(torch.zeros(2)).key == tensor_constant(torch.zeros(2)).key


def _nodes() -> tuple[fx.Node, fx.Node, fx.Node]:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    square = graph.call_function(aten.mul.Tensor, (x, x))
    commuted = graph.call_function(aten.mul.Tensor, (y, square))
    concat = graph.call_function(aten.cat.default, ([square, y], -1))
    return square, commuted, concat


def test_the_matcher_commutes_repeats_and_looks_into_lists() -> None:
    square, commuted, concat = _nodes()
    x = Var("x")
    same = call(aten.mul.Tensor, x, x)
    assert first_match(same, square) is not None
    assert first_match(same, commuted) is None
    pattern = call(aten.mul.Tensor, call(aten.mul.Tensor, x, x, name="inner"), Var("y"), commutes=True)
    found = first_match(pattern, commuted)
    assert found is not None
    assert found["inner"] is square
    assert found["y"].name == "y"
    assert first_match(call(aten.cat.default, [same, Var("y")], -1), concat) is not None
    assert first_match(call(aten.cat.default, [same], -1), concat) is None
    assert first_match(Either((call(aten.add.Tensor, x, x), same)), square) is not None
    assert first_match(call(aten.cat.default, [same, Var("y")]), concat) is None
