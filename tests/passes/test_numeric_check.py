"""What the check records, what it refuses, what it keeps in memory, and the file it leaves."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import BrokenPassError, NumericError, PipelineError, SourceError
from qcompile.frontend import load
from qcompile.ir.constants import Cast, Constant
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext, parse_pipeline
from qcompile.passes.bisect import ErrorAbove, first_failing_pass, first_failing_rewrite
from qcompile.passes.calibration import Calibration
from qcompile.passes.calibration_data import CalibrationData
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.convert_dtype import ConvertDtype
from qcompile.passes.effects import divergence_per_token, sqnr
from qcompile.passes.example_run import ExampleRun
from qcompile.passes.instruments import NumericCheck, outputs
from qcompile.passes.manager import run_pass, run_pipeline
from qcompile.passes.pipelines import default_pipeline, insert, registry
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.reproducer import load_reproducer, write_reproducer
from qcompile.target import parse_target
from tests.models import tiny
from tests.passes.helpers import Gated, capture, context


@pytest.fixture
def gated() -> Graph:
    torch.manual_seed(0)
    return capture(Gated(), torch.randn(2, 32))


def test_noise_and_divergence_are_what_their_formulas_say() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert sqnr([x * 1.1], [x]) == pytest.approx(20)
    assert sqnr([x * 1.1, x * 1.2], [x, x]) == pytest.approx(-10 * math.log10(0.025))
    assert sqnr([x], [x]) is None
    flat, sharp = torch.zeros(1, 2, 2), torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence_per_token(flat, sharp, None) == pytest.approx(expected / 2)
    assert divergence_per_token(flat, sharp, torch.tensor([[True, False]])) == pytest.approx(expected)


def test_lossy_passes_record_noise_and_exact_ones_only_what_has_come_together(gated: Graph) -> None:
    before = gated.clone()
    exact, lossy = run_pipeline(gated, [Canonicalize(), QuantizeWeights()], context("cpu-int8"), check=NumericCheck())
    assert (exact.exact, exact.sqnr_db, exact.kl, exact.total_kl) == (True, None, None, None)
    assert lossy.exact is False
    assert lossy.kl is None  # no language model
    (got,), (expected,) = outputs(gated, wide=False), outputs(before, wide=False)
    noise = (got - expected).double().square().sum() / expected.double().square().sum()
    assert lossy.sqnr_db == pytest.approx(-10 * math.log10(noise))
    assert lossy.total_sqnr_db == pytest.approx(lossy.sqnr_db, abs=0.01)


@dataclass(frozen=True)
class Poison(Pass):
    """Divides by zero what it says it rounds."""

    name: ClassVar[str] = "poison"
    exact: ClassVar[bool] = False

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        norm = graph.calls(torch.ops.aten.rsqrt.default)[0]
        wrong = graph.insert(norm.next, torch.ops.aten.div.Tensor, (norm, 0.0))
        norm.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
        return True


@dataclass(frozen=True)
class Crash(Pass):
    """Fails after its first rewrite."""

    name: ClassVar[str] = "crash"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        for node in graph.calls(torch.ops.aten.linear.default):
            if ctx.spend():
                graph.insert(node, torch.ops.aten.relu.default, (node.args[0],))
                raise RuntimeError("out of ideas")
        return False


def test_a_lossy_pass_may_not_lose_numbers(gated: Graph) -> None:
    with pytest.raises(NumericError, match=r"poison: expected numbers where there were numbers, got NaN or infinity; first at "):
        run_pipeline(gated, [Poison()], context(), check=NumericCheck())


def test_a_crash_leaves_a_reproducer_and_is_bisected(gated: Graph, tmp_path: Path) -> None:
    with pytest.raises(BrokenPassError, match=r"out of ideas; .*qcompile replay .*crash-[0-9a-f]{12}\.safetensors"):
        run_pipeline(gated.clone(), [Canonicalize(), Crash()], context(fuel=200), check=NumericCheck(reproducers=tmp_path))
    (file,) = tmp_path.iterdir()
    reproducer = load_reproducer(file)
    assert reproducer.options["fuel"] is not None
    assert 0 < reproducer.options["fuel"] < 200
    culprit = first_failing_pass(gated, [Canonicalize(), Crash()], context(), lambda _: True)
    assert culprit is not None
    assert (culprit.index, culprit.name, "out of ideas" in culprit.error) == (1, "crash", True)
    assert culprit.rewrite is not None
    assert culprit.rewrite.number == 1


def test_bisection_wants_a_predicate_that_holds_at_first_and_finds_nothing_where_nothing_is_wrong(gated: Graph) -> None:
    with pytest.raises(PipelineError, match="expected a predicate that holds before the first pass"):
        first_failing_pass(gated, [Canonicalize()], context(), lambda _: False)
    assert first_failing_pass(gated, [Canonicalize()], context(), ErrorAbove(1e-5)) is None
    # A pass that spends no fuel is wrong as a whole.
    assert (
        first_failing_rewrite(gated, ConvertDtype(to="bf16"), context(), lambda graph: graph.fingerprint() == gated.fingerprint()) is None
    )


def test_without_fuel_no_pass_rewrites_but_those_that_do_one_thing() -> None:
    target = parse_target("cpu-w8a8")
    graph, ctx = load(tiny("llama")).graph, PassContext(target)
    steps = default_pipeline(target)
    for extra in parse_pipeline("fold-norms,rotate-hadamard{online=linears+keys}", registry()):
        steps = insert(steps, extra, before="rewrite-kv-cache")
    changed = {}
    for step in steps[: [step.name for step in steps].index("lower-to-kernels")]:
        still = graph.clone()
        run_pass(still, step, replace(ctx, fuel=0))
        graph.remove_dead()
        still.remove_dead()  # what an earlier pass left without users may go
        changed[step.name] = graph.fingerprint() != still.fingerprint()
        run_pass(graph, step, ctx)
    assert {name for name, has in changed.items() if has} == {"rewrite-kv-cache"}
    assert len(changed) > 10


@dataclass
class Loads:
    """Bytes of tensors that are alive, of those that were loaded, and the most there were."""

    alive: int = 0
    most: int = 0

    def made(self, tensor: Tensor) -> Tensor:
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size: int) -> None:
        self.alive -= size


@dataclass(frozen=True, eq=False)
class CountedSource:
    """A source whose tensors are counted while they live."""

    constant: Constant
    loads: Loads = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.constant.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.constant.dtype

    @property
    def key(self) -> str:
        return self.constant.key

    def load(self) -> Tensor:
        return self.loads.made(self.constant.materialize().clone())


def test_constants_that_find_no_room_are_held_one_operator_at_a_time() -> None:
    layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(6)]
    graph = capture(torch.nn.Sequential(*layers), torch.randn(2, 64))
    one, loads = 64 * 64 * 4, Loads()
    expected = ExampleRun().run(graph, wide=False)
    for name, constant in list(graph.constants.items()):
        graph.bind(name, Constant(CountedSource(constant, loads)))
    runner = ExampleRun(limit=2 * one)
    for _ in range(2):
        assert torch.equal(runner.run(graph, wide=False)[0], expected[0])
    gc.collect()
    assert runner.held == loads.alive == 2 * one
    assert loads.most <= 3 * one
    before = loads.most
    roomy = ExampleRun()
    roomy.run(graph, wide=False)
    assert loads.most > before
    assert roomy.held == 6 * one


def test_a_reproducer_brings_back_casts_scheme_and_calibration(gated: Graph, tmp_path: Path) -> None:
    target = parse_target("sm90-w4a8-kv4")
    data = Calibration(lambda: CalibrationData("mine", samples=({"x": torch.ones(2, 32)}, torch.zeros(1, 32), (torch.ones(3, 32),))))
    data.data  # noqa: B018  what no pass has read is not stored
    ctx = PassContext(target, max_context=77, calibration=data)
    run_pipeline(gated, [Canonicalize(), ConvertDtype(to="bf16")], ctx)
    write_reproducer(tmp_path / "it.safetensors", gated, "quantize-weights{rounding=mse-clip}", ctx, 1e-9, "what was said")
    found = load_reproducer(tmp_path / "it.safetensors")
    assert found.graph.text() == gated.text()
    assert (found.spec, found.tolerance, found.error) == ("quantize-weights{rounding=mse-clip}", 1e-9, "what was said")
    assert found.context().target == target
    assert found.context().max_context == 77
    weight = found.graph.constants["gate.weight"]
    assert weight.transforms == (Cast(torch.bfloat16),)
    assert torch.equal(weight.source.load(), gated.constants["gate.weight"].source.load())
    assert found.calibration is not None
    named, plain, several = found.calibration.samples
    assert (list(named), plain.shape, len(several)) == (["x"], (1, 32), 1)


@pytest.mark.parametrize(("harm", "message"), [
    (lambda content: content[: len(content) // 2], "expected a reproducer"),
    (lambda content: b"not a tensor in sight", "expected a reproducer"),
    (lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "damaged: its contents do not have the SHA-256"),
    (lambda content: content.replace(b"aten.rsqrt.default", b"aten.rsqrt.notthat"), "damaged: its contents do not have the SHA-256"),
])  # fmt: skip
def test_a_damaged_reproducer_is_refused(gated: Graph, tmp_path: Path, harm: object, message: str) -> None:
    path = tmp_path / "it.safetensors"
    write_reproducer(path, gated, "canonicalize", context())
    path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(SourceError, match=rf"it\.safetensors: {message}"):
        load_reproducer(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    for path, found in ((tmp_path / "x.safetensors", "a file of another kind"), (tmp_path / "none", "No such file")):
        with pytest.raises(SourceError, match=rf"expected a reproducer .* got .*{found}"):
            load_reproducer(path)
