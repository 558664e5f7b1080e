"""Idioms of exporters become one operator, and what only looks like one stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from onnx import NodeProto

from qcompile.frontend import load
from qcompile.ir.graph import operator_name
from qcompile.passes.base import PassContext
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.target import parse_target
from tests.frontend.onnx.making import FLOAT, make, node, random, saved, stock

NUMBERS = {
    "two": np.float32(2), "one": np.float32(1), "half": np.float32(0.5), "root": np.float32(2**0.5), "eps": np.float32(1e-5),
    "last": np.array([-1]), "first": np.array([1]), "g": random(6), "b": random(6, seed=1), "w": random(6, 6), "k": np.float32(0.6),
}  # fmt: skip


def _norm(axes: str = "last") -> list[NodeProto]:
    return [
        node("ReduceMean", f"x {axes}", "m"), node("Sub", "x m", "d"), node("Pow", "d two", "q"), node("ReduceMean", f"q {axes}", "v"),
        node("Add", "v eps", "e"), node("Sqrt", "e", "r"), node("Div", "d r", "n"), node("Mul", "n g", "s"), node("Add", "s b", "y"),
    ]  # fmt: skip


def _gelu(half: str = "half") -> list[NodeProto]:
    return [
        node("Div", "x root", "a"),
        node("Erf", "a", "f"),
        node("Add", "f one", "c"),
        node("Mul", "x c", "p"),
        node("Mul", f"p {half}", "y"),
    ]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("Sigmoid", "x", "s"), node("Mul", "x s", "y")], {"silu"}),
        ([node("Sigmoid", "x", "s"), node("Mul", "s g", "y")], {"sigmoid", "mul"}),
        (_gelu(), {"gelu"}),
        ([node("Mul", "x half", "h"), *_gelu()[:3], node("Mul", "h c", "y")], {"gelu"}),
        (_gelu("k"), {"div", "erf", "add", "mul"}),
        (_norm(), {"layer_norm"}),
        (_norm("first"), {"mean", "sub", "pow", "add", "rsqrt", "mul"}),
        ([node("MatMul", "x w", "m"), node("Add", "b m", "y")], {"t", "linear"}),
        ([node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "x wt", "m"), node("Add", "m b", "y")], {"linear"}),
    ],
)
def test_idioms(nodes: list[NodeProto], expected: set[str], tmp_path: Path) -> None:
    read = {name for item in nodes for name in item.input}
    weights: dict[str, Any] = {name: value for name, value in NUMBERS.items() if name in read}
    path = saved(make(nodes, {"x": (["batch", 3, 6], FLOAT)}, "y", weights), tmp_path)
    graph = load(path).graph
    found = {operator_name(item.target).split(".")[1] for item in graph.nodes if item.op == "call_function"}
    assert found == expected
    x = torch.randn(2, 3, 6)
    assert torch.allclose(graph(x=x), stock(path, {"x": x})[0], atol=1e-5)


@pytest.mark.parametrize("inverse", [[node("Reciprocal", "r", "i"), node("Mul", "x i", "n")], [node("Div", "x r", "n")]])
def test_norms_by_the_mean_square_are_raised(inverse: list[NodeProto], tmp_path: Path) -> None:
    nodes = [
        node("Pow", "x two", "q"), node("ReduceMean", "q last", "v"), node("Add", "v eps", "e"), node("Sqrt", "e", "r"), *inverse,
        node("Mul", "g n", "y"),
    ]  # fmt: skip
    weights = {name: NUMBERS[name] for name in ("two", "last", "eps", "g")}
    graph = load(saved(make(nodes, {"x": (["batch", 6], FLOAT)}, "y", weights), tmp_path)).graph
    context = PassContext(parse_target("cpu-int4"))
    Canonicalize().run(graph, context)
    RaisePatterns().run(graph, context)
    (norm,) = graph.calls(torch.ops.qcompile.rms_norm.default)
    assert norm.args[2] == 1e-5
    assert sum(item.op == "call_function" for item in graph.nodes) == 1
