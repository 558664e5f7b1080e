"""Statistics: the numbers that a whole run gives, measured once, kept, and carried over a change of basis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import PassError, SourceError
from qcompile.ir.graph import Graph
from qcompile.passes import statistics
from qcompile.passes.calibration import Calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.collectors import gram
from qcompile.passes.execution import Execution
from qcompile.passes.manager import run_pipeline
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.passes.statistics import Request, Statistics
from qcompile.passes.work import WorkStore
from tests.passes.helpers import capture, context
from tests.passes.test_stream import calibration, language_model, linear_inputs, tokens

KINDS = ("second_moment", "absmax", "absmean", "range", "percentile", "sample")
aten = torch.ops.aten


@pytest.fixture(scope="module")
def model() -> Graph:
    return language_model()


def value_name(graph: Graph, linear: int = -1) -> str:
    """The input of a linear: the last one reads the final norm."""
    return str(graph.calls(aten.linear.default)[linear].args[0])


def expected(rows: Tensor, kind: str) -> Tensor:
    wide = rows.double()
    made = {
        "second_moment": lambda: wide.T @ wide / len(wide),
        "absmax": lambda: wide.abs().amax(0),
        "absmean": lambda: wide.abs().mean(0),
        "range": lambda: torch.stack((wide.amin(0), wide.amax(0))),
        "percentile": lambda: torch.quantile(wide.abs(), 0.999, dim=0),
        "sample": lambda: wide,
    }
    return made[kind]().float()


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_all_tokens(model: Graph, kind: str) -> None:
    linear = model.calls(aten.linear.default)[-1]
    rows = linear_inputs(model, calibration())[linear.name]
    ctx = context(calibration=calibration())
    request = Request(value_name(model), kind)
    found = ctx.statistics(model, [request])[request]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(rows, kind), rtol=1e-5, atol=1e-6)


def test_a_sample_is_drawn_from_all_tokens_once(model: Graph) -> None:
    rows = linear_inputs(model, calibration())[model.calls(aten.linear.default)[-1].name]
    request = Request(value_name(model), "sample", 17)
    found = context(calibration=calibration()).statistics(model, [request])[request]
    places = [int((rows == row).all(1).nonzero()[0]) for row in found]
    assert len(set(places)) == 17
    assert places == sorted(places)
    assert places[-1] >= len(rows) // 2


def test_padding_does_not_count(model: Graph) -> None:
    ids, mask = tokens(2), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    request = Request(value_name(model, 0), "absmean")
    padded = calibration([{"input_ids": ids, "attention_mask": mask}])
    whole = linear_inputs(model, padded)["linear"]
    found = context(calibration=padded).statistics(model, [request])[request]
    assert len(whole) == 20
    torch.testing.assert_close(found, whole.abs().mean(0))


def test_convolutions_are_measured_by_channel() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = capture(module, torch.randn(2, 3, 8, 8))
    run_pipeline(graph, [Canonicalize(), RemoveDeadCode()], context())
    given = [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8)]
    first, relu = graph.calls(aten.conv2d.default)[0], graph.calls(aten.conv2d.default)[1].args[0]
    requests = [Request(graph.placeholders[0].name, "absmax"), Request(first.name, "range"), Request(str(relu), "absmean")]
    found = context(calibration=calibration(given)).statistics(graph, requests)
    outputs = torch.cat([module[0](x).movedim(1, -1).reshape(-1, 4) for x in given])
    torch.testing.assert_close(found[requests[0]], torch.cat([x.movedim(1, -1).reshape(-1, 3) for x in given]).abs().amax(0))
    torch.testing.assert_close(found[requests[1]], torch.stack((outputs.amin(0), outputs.amax(0))))
    torch.testing.assert_close(found[requests[2]], outputs.relu().mean(0))


@pytest.mark.parametrize("size", [5, 100, 200])
def test_gram_matrices_are_symmetric_and_near(size: int) -> None:
    rows = torch.randn(1500, size)
    found, wide = gram(rows), rows.double()
    assert torch.equal(found, found.T)
    exact = wide.T @ wide
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever statistics run a graph."""
    counted: list[int] = []

    class Counted(Execution):
        def observe(self) -> None:
            counted.append(len(self._observers))
            super().observe()

    monkeypatch.setattr(statistics, "Execution", Counted)
    return counted


def test_what_is_known_is_not_measured_again(model: Graph, runs: list[int]) -> None:
    ctx = context(calibration=calibration())
    first, second = Request(value_name(model), "absmax"), Request(value_name(model, 0), "absmax")
    ctx.statistics(model, [first])
    ctx.statistics(model, [first])
    ctx.statistics(model.clone(), [first, second])
    assert runs == [1, 1]


def test_another_process_finds_them_on_disk(model: Graph, runs: list[int], tmp_path: Path) -> None:
    request = Request(value_name(model), "second_moment")
    results = [Statistics(WorkStore("t", tmp_path)).measure(model, calibration(), [request])[request] for _ in range(2)]
    assert runs == [1]
    assert torch.equal(*results)
    Statistics(WorkStore("t", tmp_path)).measure(model, calibration(tokens(3)), [request])
    assert runs == [1, 1]  # other data, other results


def test_an_interrupted_measurement_keeps_what_was_finished(model: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = model.calls(aten.linear.default)
    requests = [Request(str(node.args[0]), "second_moment") for node in linears]
    whole = Statistics().measure(model, calibration(), requests)
    written: list[str] = []
    original = WorkStore.put

    def put(self: WorkStore, name: str, tensors: dict[str, Tensor]) -> object:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return original(self, name, tensors)

    monkeypatch.setattr(WorkStore, "put", put)
    limits = statistics.Limits(constants=1)
    with pytest.raises(KeyboardInterrupt):
        Statistics(WorkStore("t", tmp_path)).measure(model, calibration(), requests, limits=limits)
    monkeypatch.setattr(WorkStore, "put", lambda self, name, tensors: (written.append(name), original(self, name, tensors))[1])
    resumed = Statistics(WorkStore("t", tmp_path)).measure(model, calibration(), requests, limits=limits)
    assert len(written) == len(set(written)) == len(set(requests))
    assert all(torch.equal(resumed[request], whole[request]) for request in requests)


@dataclass(frozen=True)
class Matrix:
    """T along an axis, as a change of basis applies it."""

    matrix: Tensor

    @property
    def size(self) -> int:
        return len(self.matrix)

    def apply(self, tensor: Tensor, axis: int, *, contravariant: bool = False) -> Tensor:
        wide = self.matrix.double()
        wide = torch.linalg.inv(wide).T if contravariant else wide
        return (tensor.movedim(axis, -1) @ wide.T).movedim(-1, axis)


@pytest.mark.parametrize("contravariant", [False, True])
def test_second_moments_follow_a_change_of_basis_without_a_run(model: Graph, runs: list[int], contravariant: bool) -> None:
    ctx = context(calibration=calibration())
    inside, outside = value_name(model), value_name(model, 0)
    requests = [Request(name, kind) for name in (inside, outside) for kind in KINDS]
    before = ctx.statistics(model, requests)
    basis = Matrix(torch.randn(32, 32) + 4 * torch.eye(32))
    changed = model.clone()
    node = next(node for node in changed.nodes if node.name == inside)
    weight = str(node.users.copy().popitem()[0].args[1])
    changed.add_constant("something", torch.ones(1))
    ctx.taken.rebase(model.fingerprint(), changed, [(inside, 2, contravariant), (weight, 1, False)], basis)
    carried = [request for request in requests if request.node == outside or request.kind in ("second_moment", "sample")]
    after = ctx.statistics(changed, carried)
    assert runs == [2]
    rows = before[Request(inside, "sample")].double()
    rotated = basis.apply(rows, 1, contravariant=contravariant)
    torch.testing.assert_close(after[Request(inside, "sample")], rotated.float())
    torch.testing.assert_close(after[Request(inside, "second_moment")], expected(rotated, "second_moment"), rtol=1e-4, atol=1e-4)
    assert torch.equal(after[Request(outside, "absmax")], before[Request(outside, "absmax")])
    ctx.statistics(changed, [Request(inside, "absmax")])
    assert runs == [2, 1]  # maxima are taken anew


def test_a_change_of_part_of_the_axis_is_not_carried_over(model: Graph, runs: list[int]) -> None:
    ctx = context(calibration=calibration())
    request = Request(value_name(model), "second_moment")
    ctx.statistics(model, [request])
    changed = model.clone()
    changed.add_constant("something", torch.ones(1))
    ctx.taken.rebase(model.fingerprint(), changed, [(request.node, 2, False)], Matrix(torch.eye(8)))
    ctx.statistics(changed, [request])
    assert runs == [1, 1]


def test_mistakes_are_named(model: Graph) -> None:
    ctx = context(calibration=calibration())
    with pytest.raises(PassError, match="statistics: expected a value of the graph, got 'nowhere'"):
        ctx.statistics(model, [Request("nowhere", "absmax")])
    with pytest.raises(PassError, match=r"expected one of second_moment, .*, got 'median'"):
        ctx.statistics(model, [Request(value_name(model), "median")])
    with pytest.raises(SourceError, match="statistics: expected calibration data, got none; pass calibration="):
        context().statistics(model, [Request(value_name(model), "absmax")])


def test_calibration_that_repeats_is_the_same_key() -> None:
    assert calibration().key == calibration().key
    assert isinstance(calibration(), Calibration)
    assert calibration(tokens(4)).key != calibration().key
