"""Pipelines as text, the manager, the numeric check, memory offsets."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import PassError, PipelineError, VerifyError
from qcompile.ir.graph import Graph
from qcompile.ir.memory import Lifetime, assign_offsets
from qcompile.passes.base import Pass, PassContext, parse_pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import RECIPES, choose_passes, default_pipeline, insert, pipeline_text, registry
from qcompile.target import known_targets, parse_target
from tests.passes.helpers import Gated, capture, context

ROOM = Path(__file__).parents[2] / "passes"


@pytest.mark.parametrize("target", [*known_targets(), "cpu-fp32-kv4", "sm90-w4a4-kv4"])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_default_pipeline_prints_and_parses_back(recipe: str, calibrated: bool, target: str) -> None:
    pipeline = default_pipeline(parse_target(target), recipe, calibrated=calibrated)
    assert parse_pipeline(pipeline_text(pipeline), registry()) == pipeline


def test_every_pass_of_the_room_is_registered_with_a_line_of_description() -> None:
    modules = [importlib.import_module(f"qcompile.passes.{path.stem}") for path in ROOM.glob("*.py") if path.stem != "__init__"]
    found = {item for module in modules for item in vars(module).values() if isinstance(item, type) and issubclass(item, Pass)}
    assert {item.name: item for item in found - {Pass}} == registry()
    assert all((item.__doc__ or "").strip() for item in found)


def test_best_without_data_needs_none() -> None:
    names = [step.name for step in default_pipeline(parse_target("cpu-w4a8-kv4"), "best", calibrated=False)]
    assert "smooth-activations" not in names
    assert "quantize-weights{rounding=mse-clip}" in pipeline_text(default_pipeline(parse_target("cpu-int4"), "best", calibrated=False))


@pytest.mark.parametrize(
    ("target", "rounding"), [("cpu-int8", "gptq"), ("cpu-w8a8", "gptq"), ("cpu-int4", "learned"), ("sm90-w4a4", "learned")]
)
def test_best_with_data_learns_where_levels_are_few(target: str, rounding: str) -> None:
    assert f"quantize-weights{{rounding={rounding}}}" in pipeline_text(default_pipeline(parse_target(target), "best"))


def test_nearest_changes_no_basis_and_high_precision_nothing() -> None:
    plain = pipeline_text(default_pipeline(parse_target("cpu-int4"), "nearest"))
    assert not any(name in plain for name in ("rotate", "smooth", "fold-norms", "gptq"))
    assert pipeline_text(default_pipeline(parse_target("sm90-bf16"), "best")).count("rotate") == 0


@dataclass(frozen=True)
class Options(Pass):
    """Every kind of option."""

    name: ClassVar[str] = "options"
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    kind: str = "a"
    names: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        return False


@given(
    step=st.builds(
        Options, count=st.integers(-9, 9), rate=st.floats(0, 4).map(lambda x: round(x, 3)), flag=st.booleans(),
        kind=st.sampled_from(["a", "b-c"]), names=st.lists(st.sampled_from(["x", "y.z"])).map(tuple),
    )
)  # fmt: skip
def test_a_spec_parses_back(step: Options) -> None:
    assert parse_pipeline(step.spec + ",options", {"options": Options}) == [step, Options()]


@pytest.mark.parametrize(("text", "message"), [
    ("canonicalise", "unknown pass 'canonicalise'; expected one of assign-kv-formats, canonicalize"),
    ("canonicalize;", "expected name or name{option=value} at 'canonicalize;'"),
    ("fold-constants{limits=3}", "pass fold-constants: unknown option 'limits'; expected one of limit"),
    ("fold-constants{limit=big}", "option limit: expected int, got 'big'"),
    ("fold-constants{limit}", "fold-constants: expected option=value, got 'limit'"),
    ("options{flag=yes}", "option flag: expected true or false, got 'yes'"),
])  # fmt: skip
def test_pipelines_that_do_not_parse_say_where(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_pipeline(text, registry() | {"options": Options})


def test_a_user_can_insert_replace_and_disable() -> None:
    target = parse_target("cpu-int4")
    pipeline = default_pipeline(target)
    longer = insert(pipeline, Options(), after="quantize-weights")
    assert [step.name for step in longer].index("options") == [step.name for step in pipeline].index("quantize-weights") + 1
    assert insert(pipeline, Options(), before="canonicalize")[0] == Options()
    assert "fuse-residual-norm" not in {step.name for step in choose_passes(target, "nearest", None, ["fuse-residual-norm"])}
    assert [step.name for step in choose_passes(target, "nearest", "canonicalize,plan-memory")] == ["canonicalize", "plan-memory"]
    with pytest.raises(PipelineError, match="disabled pass 'rotate': expected one of the pipeline's"):
        choose_passes(target, "nearest", None, ["rotate"])
    with pytest.raises(PipelineError, match="insert options: expected one of the pipeline's passes"):
        insert(pipeline, Options(), after="rotate")
    with pytest.raises(PipelineError, match="recipe 'hardest': expected one of best, nearest"):
        default_pipeline(target, "hardest")


@dataclass(frozen=True)
class Broken(Pass):
    """Claims to be exact and multiplies the output by `factor`; or fails, or leaves an illegal graph."""

    name: ClassVar[str] = "broken"
    factor: float = 1.001
    kind: str = "wrong"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        if self.kind == "crash":
            raise RuntimeError("out of ideas")
        (result,) = graph.output.args[0]  # type: ignore[misc]
        scaled = graph.insert(graph.output, torch.ops.aten.mul.Tensor, (result, self.factor))
        graph.output.args = ((scaled,),)
        if self.kind == "illegal":
            del scaled.meta["val"]
        return True


def test_the_check_finds_a_pass_that_changes_the_function() -> None:
    graph = capture(Gated(), torch.randn(2, 32))
    with pytest.raises(PassError, match=r"broken: expected the same function within 1e-09 .* got 0.001; .* --disable-pass broken"):
        run_pipeline(graph, [Canonicalize(), Broken()], context(), check=NumericCheck())


def test_the_check_does_not_mind_rounding_and_records_the_error() -> None:
    graph = capture(Gated(), torch.randn(2, 32))
    records = run_pipeline(graph, [Canonicalize(), Broken(factor=1 + 1e-12)], context(), check=NumericCheck())
    assert records[1].max_error is not None
    assert 1e-13 < records[1].max_error < 1e-11


def test_a_pass_that_crashes_is_named() -> None:
    with pytest.raises(PassError, match="broken: failed with RuntimeError: out of ideas; disable it with --disable-pass broken"):
        run_pipeline(capture(Gated(), torch.randn(2, 32)), [Broken(kind="crash")], context())


def test_a_pass_that_leaves_an_illegal_graph_is_found() -> None:
    with pytest.raises(VerifyError, match=r"mul_?.*: expected meta\['val'\], got none; make nodes with Graph.insert"):
        run_pipeline(capture(Gated(), torch.randn(2, 32)), [Broken(kind="illegal")], context())


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=40))
def test_buffers_that_live_together_do_not_overlap(parts: list[tuple[int, int, int]]) -> None:
    lives = {f"b{index}": Lifetime(size, first, first + length) for index, (size, first, length) in enumerate(parts)}
    offsets, total = assign_offsets(lives)
    for name, life in lives.items():
        assert offsets[name] % 64 == 0
        assert offsets[name] + life.size <= total
        for other, rival in lives.items():
            if name != other and life.overlaps(rival):
                assert offsets[name] + life.size <= offsets[other] or offsets[other] + rival.size <= offsets[name]


def test_buffers_that_do_not_live_together_share_memory() -> None:
    _, total = assign_offsets({"a": Lifetime(640, 0, 1), "b": Lifetime(640, 2, 3), "c": Lifetime(64, 1, 2)})
    assert total == 704
