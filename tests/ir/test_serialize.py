"""Graphs as JSON: the same graph comes back, the same bytes go out, and nothing in a file is ever evaluated."""

from __future__ import annotations

import builtins
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import ArtifactError
from qcompile.ir import codec
from qcompile.ir.deserialize import graph_from_json
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import KernelSpec, Plan
from qcompile.ir.memory import dtype_of
from qcompile.ir.serialize import format_of, graph_to_json, memory_format_of
from qcompile.ir.serialize_plan import plan_from_json, plan_to_json
from qcompile.quant.element import INT4
from qcompile.quant.granularity import Granularity
from qcompile.quant.scheme import QuantFormat
from tests.models import example_inputs, tiny
from tests.passes.helpers import capture

aten = torch.ops.aten
FAMILIES = ("llama", "gemma2", "gpt2", "qwen2_moe", "bert", "resnet")


def text_of(graph: Graph) -> str:
    """The stored form."""
    return json.dumps(graph_to_json(graph), sort_keys=True, allow_nan=False)


def again(graph: Graph) -> Graph:
    """Through JSON and back, over the same constants."""
    return graph_from_json(json.loads(text_of(graph)), dict(graph.constants))


@pytest.fixture(scope="module", params=FAMILIES)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    options = {} if request.param in ("llama", "gemma2", "gpt2", "qwen2_moe") else {"example_inputs": example_inputs(request.param)}
    return qcompile.compile(tiny(request.param), "cpu-int4", **options, engine="torch_cpu")  # type: ignore[arg-type]


def test_graphs_come_back(compiled: CompiledModel) -> None:
    graph, copy = compiled.graph, again(compiled.graph)
    assert copy.text() == graph.text()
    assert copy.fingerprint() == graph.fingerprint()
    assert (copy.interface.inputs, copy.interface.outputs, copy.interface.kind) == (
        graph.interface.inputs, graph.interface.outputs, graph.interface.kind,
    )  # fmt: skip
    for name, tensor in graph.interface.examples.items():
        assert torch.equal(copy.interface.examples[name], tensor)
        assert copy.interface.examples[name].dtype == tensor.dtype
    assert [node.meta["source"] for node in copy.nodes] == [node.meta.get("source", "") for node in graph.nodes]


def test_stored_graphs_are_the_same_bytes_after_a_round_trip(compiled: CompiledModel) -> None:
    stored = text_of(compiled.graph)
    assert text_of(compiled.graph) == stored
    assert text_of(again(compiled.graph)) == stored


def test_plans_come_back(compiled: CompiledModel) -> None:
    plan = compiled.contents.plan
    stored = json.dumps(plan_to_json(plan), sort_keys=True, allow_nan=False)
    assert plan_from_json(json.loads(stored)) == plan
    assert json.dumps(plan_to_json(plan_from_json(json.loads(stored))), sort_keys=True) == stored


def test_a_graph_that_came_back_runs() -> None:
    inputs = example_inputs("bert")
    compiled = qcompile.compile(tiny("bert"), "cpu-int8", example_inputs=inputs, engine="torch_cpu")
    leaves = [inputs[node.name] for node in compiled.graph.placeholders]
    pairs = zip(again(compiled.graph).run(leaves), compiled.graph.run(leaves), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


class Arguments(nn.Module):
    """Every kind of argument that an operator takes."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.full((x.shape[0], 4), -math.inf, dtype=torch.float32, device=x.device)
        y = torch.where(x > 0, x, y).clamp(min=-1e30, max=math.inf)
        y = y.to(torch.float64).to(torch.float32).clone(memory_format=torch.contiguous_format)
        first, second = y.split([1, 3], dim=1)
        picked = torch.cat([second, first], dim=-1)[:, torch.tensor([0, 2, 1, 3])]
        padded = nn.functional.pad(picked, (1, 1), value=0.5).reshape(x.shape[0] * 2, 3)
        return padded.view(x.shape[0], 6)[:, 1:-1:2]


def test_every_kind_of_argument_comes_back() -> None:
    graph = capture(Arguments(), torch.randn(5, 4))
    copy = again(graph)
    assert copy.text() == graph.text()
    for rows in (5, 8):
        x = torch.randn(rows, 4)
        assert torch.equal(copy(x), graph(x))


@pytest.mark.parametrize("value", [
    None, True, 3, -2.5, "mean", math.inf, -math.inf, torch.bfloat16, torch.strided, torch.preserve_format, torch.device("cpu"),
    [1, [2, [3, None]]], (1, (2.5,)), slice(None, -1, 2), slice(1, None), [], [torch.int64, (math.inf,)],
], ids=repr)  # fmt: skip
def test_an_argument_comes_back_with_its_type(value: Any) -> None:
    graph = capture(Arguments(), torch.randn(5, 4))
    node = next(node for node in graph.fx.nodes if node.op == "call_function")
    node.kwargs = {"own": value}
    copied = next(item for item in again(graph).fx.nodes if item.name == node.name)
    assert _plain(copied.kwargs["own"]) == _plain(value)


def _plain(value: Any) -> Any:
    """Values with their types, and fx's immutable lists as plain ones."""
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return (bool if isinstance(value, bool) else type(value), value)


def test_nan_comes_back() -> None:
    graph = capture(Arguments(), torch.randn(5, 4))
    node = next(node for node in graph.fx.nodes if node.op == "call_function")
    node.kwargs = {"own": math.nan}
    assert math.isnan(next(item for item in again(graph).fx.nodes if item.name == node.name).kwargs["own"])


@pytest.mark.parametrize(("change", "message"), [
    (lambda node: setattr(node, "kwargs", {"own": object}), "expected nodes, numbers, strings, dtypes and lists as arguments, got type"),
    (lambda node: setattr(node, "kwargs", {"own": torch.device("cuda")}), "as arguments, got device cuda; it cannot be stored"),
    (lambda node: setattr(node, "target", eval), "expected an operator of the allow-list, got builtins.eval; it cannot be stored"),
    (lambda node: setattr(node, "target", aten.from_file.default), "expected an operator of the allow-list, got aten.from_file"),
])  # fmt: skip
def test_what_cannot_be_stored_is_refused_with_the_node(change: Any, message: str) -> None:
    graph = capture(Arguments(), torch.randn(5, 4))
    node = next(node for node in graph.fx.nodes if node.target is aten.where.self)
    change(node)
    with pytest.raises(ArtifactError, match=rf"{node.name} \(test_serialize.py:\d+\): .*{message}"):
        graph_to_json(graph)


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was evaluated, imported by text or unpickled."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        return lambda *args, **_: seen.append(f"{name} {args[:1]}")

    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, watch(name))
    monkeypatch.setattr(pickle, "loads", watch("loads"))
    monkeypatch.setattr(pickle, "load", watch("load"))
    return seen


def test_loading_evaluates_nothing(no_evaluation: list[str]) -> None:
    monkey = "__import__('os').abort()"
    for data in (
        {"dtype": monkey},
        {"size": monkey},
        {"size": ["add", monkey, 1]},
        {"float": monkey},
        {"memory_format": monkey},
        {"slice": [monkey, 1, 2, 3]},
        {"node": monkey},
        {"python": monkey},
    ):
        with pytest.raises(ArtifactError, match=r"graph.json: "):
            graph_from_json(_one_call(data), {})
    assert no_evaluation == []
    # A string is an argument like any other, and an attribute of a module is nothing that can be asked for.
    stored = graph_from_json(_one_call(monkey), {})
    assert next(node for node in stored.fx.nodes if node.op == "call_function").args == (monkey,)
    assert no_evaluation == []


def _one_call(argument: Any, **changes: Any) -> dict[str, Any]:
    """A graph of one call on one argument."""
    common = {"type": None, "source": "", "passes": []}
    call = {"name": "call", "op": "call_function", "target": "aten.abs.default", "args": [argument], "kwargs": {}}
    nodes = [call | common | changes, {"name": "output", "op": "output", "args": [[]], "kwargs": {}} | common]
    return {"interface": {"inputs": {}, "outputs": {}, "examples": {}, "symbols": [], "kind": "module"}, "constants": {}, "nodes": nodes}


@pytest.mark.parametrize(("data", "message"), [
    (_one_call({"tuple": []}, type={"dtype": "load", "shape": []}), "graph.json: expected a dtype, got 'load'"),
    (_one_call({"node": "later"}), "graph.json: expected what this version writes, got KeyError: 'later'; compile again"),
    (_one_call({"dtype": "fp32", "tuple": []}), "call: expected an argument of node, dtype, tuple, slice, .*, got 'dtype'"),
    (_one_call(1, type={"size": ["pow", "B", 2]}), "expected what this version writes, got"),
    (_one_call(1, op="get_attr", target="weight"), "call: expected a constant of weights.safetensors, got 'weight'"),
    (_one_call(1, name=None), "expected nodes with names"),
    ([], "graph.json: expected an object with interface, constants and nodes"),
])  # fmt: skip
def test_malformed_graphs_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        graph_from_json(data, {})


def test_names_of_dtypes_and_formats() -> None:
    assert (dtype_of("bf16"), dtype_of("int64"), dtype_of("bool")) == (torch.bfloat16, torch.int64, torch.bool)
    for form in (QuantFormat(INT4, Granularity(64), True, torch.float16), QuantFormat(INT4, Granularity(-1), False, torch.float32)):
        assert format_of(str(form)) == form
    assert memory_format_of("channels_last", "x") is torch.channels_last
    with pytest.raises(ArtifactError, match=r"x: expected a memory format of contiguous_format, .*, got 'os'"):
        memory_format_of("os", "x")
    for name in ("load", "nn", "__dict__", None, 3, ["fp32"]):
        with pytest.raises(ArtifactError, match="x: expected a dtype, got"):
            dtype_of(name, "x")
    for text in (
        "",
        "int4",
        "int4 g64 sym",
        "int4 gx sym fp16",
        "int4 g64 maybe fp16",
        "int4 g64 sym load",
        "int99 g64 sym fp16",
        "int4 g0 sym fp16",
    ):
        with pytest.raises(ArtifactError, match=r"x: expected a (format|dtype)"):
            format_of(text, "x")


def test_specifications_stay_hashable() -> None:
    spec = KernelSpec("linear", (("K", 4),), (("x", "bf16"),), (("axes", (1, (2, 3))), ("eps", 1e-5)))
    decoded = codec.decode(KernelSpec, json.loads(json.dumps(codec.encode(spec))), "spec")
    assert decoded == spec
    assert hash(decoded) == hash(spec)


@pytest.mark.parametrize(("kind", "data", "message"), [
    (int, True, "x: expected int, got bool 'True'"),
    (int, 1.5, "x: expected int, got float '1.5'"),
    (float, "1", "x: expected float, got str '1'"),
    (tuple[int, ...], [1, "2"], r"x\[1\]: expected int, got str '2'"),
    (tuple[int, str], [1], r"x: expected 2 items, got list '\[1\]'"),
    (dict[str, int], [], r"x: expected an object, got list '\[\]'"),
    (float | None, "a", "x: expected float | None, got str 'a'"),
    (Plan, 3, r"x: expected an object \(Plan\), got int '3'"),
])  # fmt: skip
def test_values_of_another_type_are_refused(kind: Any, data: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        codec.decode(kind, data, "x")


def test_whole_numbers_serve_as_floats_and_sizes_as_expressions() -> None:
    assert codec.decode(tuple[float, ...], [1, 2.5], "x") == (1.0, 2.5)
    assert codec.thaw({"size": ["add", "B", ["mul", 2, "S"]]}) == {"size": ("add", "B", ("mul", 2, "S"))}


def test_an_example_of_one_value_is_stored_as_that_value() -> None:
    graph = capture(Arguments(), torch.ones(5, 4))
    (example,) = graph_to_json(graph)["interface"]["examples"].values()
    assert example == {"dtype": "fp32", "shape": [5, 4], "fill": 1.0}
    assert isinstance(graph.fx, fx.Graph)
