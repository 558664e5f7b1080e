"""One mistake planted in one pass: the check and the bisection find the pass and the place, and the reproducer repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from qcompile.errors import NumericError
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.bisect import DivergenceAbove, ErrorAbove, FailsCheck, Judge, Predicate, first_failing_pass
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.locate import Place
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.replay import replay
from qcompile.passes.reproducer import load_reproducer
from qcompile.target import parse_target
from tests.models import tiny
from tests.passes.faults import BrokenFusion, SkippingRotation, WrongScale

TARGET = parse_target("cpu-int4")
DOWN = "model.layers.0.mlp.down_proj.weight"


@dataclass(frozen=True)
class Fault:
    """A wrong pass, the right one whose place it takes, and what is to be found.

    Attributes:
        node: the first wrong value.
        constants: that the node reads.
        predicate: one that needs no check.
        rewrite: number of the wrong rewrite, and the first node that it makes.
    """

    wrong: Pass
    right: str
    node: str
    constants: tuple[str, ...]
    predicate: Predicate
    rewrite: tuple[int, str]


FAULTS = {
    "rotation": Fault(
        SkippingRotation(), "rotate-hadamard", "linear_7", ("model.layers.1.self_attn.q_proj.weight",), ErrorAbove(0.1),
        (1, "model_embed_tokens_weight"),
    ),
    "rotation of a writer": Fault(
        SkippingRotation(place=DOWN), "rotate-hadamard", "add_5", (DOWN,), ErrorAbove(0.1), (1, "model_embed_tokens_weight")
    ),
    "scale": Fault(
        WrongScale(), "quantize-weights", "linear_12", tuple(f"{WrongScale().place}.{part}" for part in ("codes", "scale")),
        DivergenceAbove(0.1), (13, "dequantize_12"),
    ),
    "fusion": Fault(BrokenFusion(), "fuse-residual-norm", "add_rms_norm_2", (), ErrorAbove(0.5), (3, "add_rms_norm_2")),
}  # fmt: skip
BY_NAME = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


STEPS = default_pipeline(TARGET, "best", calibrated=False)
FIRST = [step.name for step in STEPS].index("rotate-hadamard")


@pytest.fixture(scope="module")
def given() -> Graph:
    """The graph in front of the first pass that any fault stands for."""
    graph = load(tiny("llama")).graph
    run_pipeline(graph, STEPS[:FIRST], PassContext(TARGET))
    return graph


def pipeline(fault: Fault) -> list[Pass]:
    """The rest of the default, with the wrong pass in place of the right one."""
    return [fault.wrong if step.name == fault.right else step for step in STEPS[FIRST:]]


@BY_NAME
def test_the_check_names_pass_and_node_and_leaves_a_reproducer(fault: Fault, given: Graph, tmp_path: Path) -> None:
    check = NumericCheck(reproducers=tmp_path)
    with pytest.raises(NumericError, match=rf"{fault.wrong.name}: expected .* first at {fault.node} \(modeling_llama.py:") as caught:
        run_pipeline(given.clone(), pipeline(fault), PassContext(TARGET), check=check)
    place = caught.value.place
    assert isinstance(place, Place)
    assert place.node == fault.node
    assert place.constants == fault.constants
    assert abs(place.expected - place.got) > 0.1
    (file,) = tmp_path.iterdir()
    assert f"repeat it with `qcompile replay {file}`" in str(caught.value)
    reproducer = load_reproducer(file)
    assert reproducer.spec == fault.wrong.spec
    again = replay(reproducer, [fault.wrong]).place
    assert again is not None
    assert (again.node, again.index, again.constants) == (place.node, place.index, place.constants)
    assert (again.expected, again.got) == pytest.approx((place.expected, place.got), rel=1e-5)  # constants are stored in their own dtype
    right = next(step for step in STEPS if step.name == fault.right)
    assert not replay(reproducer, [right]).fails


@pytest.mark.parametrize(("name", "by_check"), [("rotation", True), ("scale", True), ("scale", False), ("fusion", False)])
def test_bisection_names_pass_and_rewrite(name: str, by_check: bool, given: Graph) -> None:
    fault = FAULTS[name]
    predicate: Predicate | Judge = FailsCheck() if by_check else fault.predicate
    before = given.fingerprint()
    culprit = first_failing_pass(given, pipeline(fault), PassContext(TARGET), predicate)
    assert culprit is not None
    assert culprit.name == fault.wrong.name
    assert (f"first at {fault.node} " in culprit.error) == by_check
    assert culprit.rewrite is not None
    assert (culprit.rewrite.number, culprit.rewrite.node) == fault.rewrite
    assert given.fingerprint() == before
