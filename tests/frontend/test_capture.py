"""Plain modules and exported programs: what stays symbolic, what becomes a constant, and what is refused with which words."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompile.errors import SourceError, TraceError, UnsupportedModelError
from qcompile.frontend import capture_exported, capture_module, load
from qcompile.frontend.functional import counterpart, functional, writes


class Block(nn.Module):
    """A tied linear, a buffer, a loose tensor, a number made in the forward, and a result in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.loose = torch.randn(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 2.0) -> dict[str, Any]:
        hidden = self.second(self.drop(self.first(x)).relu()) * scale + self.table + self.loose + torch.tensor([1.0, 2.0, 3.0, 4.0])
        if y is not None:
            hidden = hidden + y
        return {"hidden": hidden, "pair": (hidden.sum(-1), None), "count": 3}


class InPlace(nn.Module):
    """Writes into new tensors only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x))
        hidden += x
        hidden.mul_(2.0)
        return torch.relu_(hidden) + hidden


class Slices(nn.Module):
    """Writes into a view."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + 1
        hidden[:, 0] = 7.0
        return hidden


class Fixed(nn.Module):
    """Works at one batch only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Branches(nn.Module):
    """Looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Inverse(nn.Module):
    """Uses an operator off the list."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


class Counter(nn.Module):
    """Remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_a_module_runs_at_another_batch() -> None:
    module = Block()
    graph = capture_module(module, (torch.randn(2, 4), torch.randn(2, 4)))
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    found, expected = graph(x, y), module.eval()(x, y)
    torch.testing.assert_close(found["hidden"], expected["hidden"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pair"][0], expected["pair"][0], rtol=0, atol=1e-5)
    assert found["pair"][1] is None
    assert found["count"] == 3
    assert list(graph.interface.symbols.values()) == ["batch"]


def test_a_training_module_is_captured_in_evaluation_mode_and_left_in_training() -> None:
    module = Block()
    x = torch.randn(2, 4)
    graph = capture_module(module, x)
    assert module.training
    assert module.drop.training
    torch.testing.assert_close(graph(x)["hidden"], module.eval()(x)["hidden"], rtol=0, atol=1e-6)


def test_constants_are_handles_on_the_module_and_tied_ones_are_one() -> None:
    module = Block()
    graph = capture_module(module, torch.randn(2, 4))
    assert set(graph.constants) == {"first.weight", "first.bias", "table", "loose", "lifted_tensor_0"}
    assert graph.constants["first.weight"].materialize().data_ptr() == module.first.weight.data_ptr()


def test_nodes_carry_source_and_cpu_values() -> None:
    graph = capture_module(Block(), torch.randn(2, 4))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert all(node.meta["source"].startswith("test_capture.py:") for node in calls)
    for node in graph.nodes[:-1]:
        assert node.meta["val"].device.type == "cpu"
        assert node.meta["val"].fake_mode is graph.mode
        assert not node.meta["val"].requires_grad


def test_numbers_are_part_of_the_interface() -> None:
    graph = capture_module(Block(), {"x": torch.randn(2, 4), "scale": 3.0})
    assert graph.interface.inputs == {"tuple": [{"tuple": []}, {"dict": {"x": {"leaf": 0}, "scale": {"value": 3.0}}}]}
    assert [node.name for node in graph.placeholders] == ["x"]


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    x = torch.randn(2, 4)
    graph = capture_module(Block(), (x, x))
    assert [node.name for node in graph.placeholders] == ["x", "y"]


def test_an_example_of_one_row_is_enough() -> None:
    graph = capture_module(Block(), torch.randn(1, 4))
    assert graph(torch.randn(6, 4))["hidden"].shape == (6, 4)


def test_named_dimensions() -> None:
    graph = capture_module(nn.Linear(4, 3), torch.randn(2, 5, 4), {"input": {0: "rows", 1: "columns"}})
    assert sorted(graph.interface.symbols.values()) == ["columns", "rows"]
    assert graph(torch.randn(1, 9, 4)).shape == (1, 9, 3)


def test_an_empty_dict_fixes_every_dimension() -> None:
    graph = capture_module(Fixed(), torch.randn(2, 4), {})
    assert graph.interface.symbols == {}
    assert tuple(graph.placeholders[0].meta["val"].shape) == (2, 4)


@pytest.mark.parametrize("shapes", [None, ({0: Dim.DYNAMIC},), ({0: "rows"},)])
def test_a_dimension_that_the_model_fixes_is_named(shapes: Any) -> None:
    with pytest.raises(TraceError, match=r"Fixed: expected dimension 0 of x to vary freely, but the model fixed it to 2; .*`\{\}` fixes"):
        capture_module(Fixed(), torch.randn(2, 4), shapes)


def test_a_dimension_that_quietly_became_fixed_is_named() -> None:
    with pytest.raises(TraceError, match=r"x: expected dimension 0 to stay symbolic, but the model fixed it to 2"):
        capture_module(Fixed(), torch.randn(2, 4), ({0: Dim.AUTO},))


def test_a_range_that_the_model_needs_is_told() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[: x.shape[0]]

    with pytest.raises(TraceError, match=r"expected dimension 0 of x to vary freely, but the model needs .*8; .*such a Dim"):
        capture_module(Table(), torch.randn(3))


def test_unknown_names_in_dynamic_shapes() -> None:
    with pytest.raises(TraceError, match=r"dynamic_shapes: expected names among \['x'\], got \['z'\]"):
        capture_module(Fixed(), torch.randn(2, 4), {"z": {0: "batch"}})
    with pytest.raises(TraceError, match=r"dynamic_shapes: expected 1 entries, one per positional input, got 2"):
        capture_module(Fixed(), torch.randn(2, 4), (None, None))


def test_a_model_that_cannot_be_traced(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        TraceError, match=r"Branches \(test_capture.py:\d+\): cannot be traced by torch.export: GuardOnDataDependent.*; replace what"
    ):
        capture_module(Branches(), torch.randn(2, 4))
    assert "def forward" not in capfd.readouterr().err


def test_an_operator_off_the_list_is_named_with_its_line() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Inverse: .* got linalg_inv \(test_capture.py:\d+\): aten.linalg_inv; rewrite"):
        capture_module(Inverse(), torch.eye(3).repeat(2, 1, 1))


def test_a_forward_that_changes_a_buffer_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Counter: expected a forward without side effects, got one that changes calls; return"
    ):
        capture_module(Counter(), torch.randn(2, 4))


def test_writes_into_new_tensors_become_functional_in_place() -> None:
    module = InPlace().eval()
    x = torch.randn(3, 4)
    program = torch.export.export(module, (x,), strict=False)
    written = [node for node in program.graph.nodes if writes(node)]
    assert [str(counterpart(node)) for node in written] == ["aten.add.Tensor", "aten.mul.Tensor", "aten.relu.default"]
    assert functional(program) is program
    graph = capture_module(module, x)
    torch.testing.assert_close(graph(x), module(x), rtol=0, atol=1e-6)
    assert len(graph.calls(torch.ops.aten.batch_norm.default)) == 1


def test_writes_into_views_are_functionalized() -> None:
    x = torch.randn(3, 4)
    graph = capture_module(Slices(), x)
    torch.testing.assert_close(graph(x.clone()), Slices()(x.clone()), rtol=0, atol=0)
    assert not any(writes(node) for node in graph.nodes)


def test_half_precision_binds_casts_of_the_original() -> None:
    module = Block().bfloat16().eval()
    graph = capture_module(module, torch.randn(2, 4))
    assert graph.constants["first.weight"].key.endswith("|cast(fp32)")
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph(x)["hidden"], module.float()(x)["hidden"], rtol=0, atol=1e-6)


def test_an_exported_program() -> None:
    module = Block().eval()
    x = torch.randn(2, 4)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: Dim("rows")}}, strict=False)
    loaded = load(program)
    assert loaded.assets.model_type == "exported"
    assert list(loaded.graph.interface.symbols.values()) == ["x_0"]
    wider = torch.randn(7, 4)
    with torch.no_grad():
        torch.testing.assert_close(loaded.graph(wider)["hidden"], module(wider)["hidden"], rtol=0, atol=1e-6)


def test_a_region_without_gradients_is_inlined() -> None:
    class Guarded(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                first, second = (x * 2).chunk(2, dim=1)
            return first + 1, second

    program = torch.export.export(Guarded(), (torch.randn(2, 4),), strict=False)
    assert "wrap_with_set_grad_enabled" in str(program.graph)
    graph = capture_exported(program)
    x = torch.randn(2, 4)
    torch.testing.assert_close(graph(x), Guarded()(x), rtol=0, atol=0)


def test_control_flow_is_refused_by_name() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(UnsupportedModelError, match=r"expected plain operators, got the control flow cond"):
        capture_module(Conditional(), torch.randn(2, 4), {})


def test_a_plain_module_needs_example_inputs() -> None:
    with pytest.raises(TraceError, match=r"Block: expected example_inputs for a plain module, got none; pass a tensor"):
        load(Block())


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "qcompile.frontend.gguf", raising=False)
    with pytest.raises(SourceError, match=r"model.gguf: expected the packages that read this model, got no gguf; pip install"):
        load("model.gguf")


def test_onnx_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("qcompile.frontend.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        SourceError, match=r"model.onnx: expected the packages that read this model, got no onnx; pip install 'qcompile\[onnx\]'"
    ):
        load("model.onnx")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.onnx", r"missing.onnx: expected an ONNX file, got none"),
        (
            "no/such/place/at/all",
            r"expected a Hugging Face directory, a .gguf or .onnx file or the name of a model on the hub, got a path that does not exist",
        ),
        ("missing.gguf", r"missing.gguf: expected a GGUF file, got none"),
    ],
)
def test_paths_that_are_no_model(path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load(path)
