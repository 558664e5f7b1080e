"""What a basis pass did to the activations, as a table in the dump."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.dump.moments import MomentsRecorder, basis_changes, moments_table
from qcompile.dump.tables import written
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.manager import run_pipeline
from qcompile.passes.moments import ExampleInputs, Moments, mean_moments, measure_moments, reader_groups
from qcompile.passes.pipelines import default_pipeline, insert
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.target import parse_target
from tests.models import tiny
from tests.passes.basis_cases import outlier_graph
from tests.passes.space_cases import family_graph


def cells(text: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`."""
    (line,) = (line for line in text.splitlines() if line.startswith("│") and line.split("│")[1].strip() == first)
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_moments_are_those_of_the_tokens() -> None:
    graph, _ = outlier_graph()
    x = graph.interface.examples["x"]
    peak = (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()
    kurtosis = (x.pow(4).mean(-1) / x.square().mean(-1).square()).mean()
    found = measure_moments(graph)["linear"]
    assert found.peak == pytest.approx(peak.item(), rel=1e-6)
    assert found.kurtosis == pytest.approx(kurtosis.item(), rel=1e-6)


def test_extremes_are_one_and_the_number_of_channels() -> None:
    """One channel alone has the largest moments there are, signs alone the smallest; tokens of zeros count for nothing."""
    graph, _ = outlier_graph()
    single, even = torch.zeros(3, 64), torch.ones(3, 64)
    single[0, 5], even[1] = 7.0, -2.0
    alone, flat = (measure_moments(graph, ExampleInputs({"x": x}))["linear"] for x in (single, even))
    assert (alone.peak, alone.kurtosis) == (pytest.approx(8.0), pytest.approx(64.0))
    assert (flat.peak, flat.kurtosis) == (pytest.approx(1.0), pytest.approx(1.0))
    assert mean_moments([alone, flat]) == Moments(pytest.approx(4.5), pytest.approx(32.5))


def test_readers_are_grouped_by_space() -> None:
    groups = reader_groups(family_graph("llama"))
    stream, hidden, keys = groups["embedding"], groups["linear_4"], groups["keys"]
    assert stream == (32, ["linear", "linear_1", "linear_2", "linear_4", "linear_5", *(f"linear_{n}" for n in (7, 8, 9, 11, 12, 14))])
    assert hidden == (48, ["linear_6"])
    assert keys == (8, ["attention", "attention_1"])


def test_a_table_has_a_line_per_space() -> None:
    before, after = {"a": Moments(8.0, 64.0), "b": Moments(4.0, 6.0)}, {"a": Moments(2.0, 3.0), "b": Moments(2.5, 2.0)}
    text = written([moments_table({"stream": (64, ["a", "b", "gone"]), "other": (8, ["gone"])}, before, after, "rotate")])
    assert cells(text, "stream") == ["stream", "64", "2", "6", "2.25", "35", "2.5"]
    assert "other" not in text


def test_any_pass_that_changes_a_basis_is_measured_and_no_other() -> None:
    graph, ctx = outlier_graph()
    recorder = MomentsRecorder()
    recorder.before(graph)
    assert recorder.after(graph, "nothing") is None
    run_pipeline(graph, [RotateHadamard(online=("linears",))], ctx)
    assert recorder.after(graph, "without a before") is None
    assert any("hadamard(96) dual" in change for change in basis_changes(graph))
    fresh, _ = outlier_graph()
    recorder.before(fresh)
    run_pipeline(fresh, [RotateHadamard()], ctx)
    table = recorder.after(fresh, "rotate-hadamard")
    assert table is not None
    _, channels, readers, old, new, *_ = cells(written([table]), "linear")
    assert (channels, readers) == ("64", "3")
    assert float(old) > 6 > 2.5 > float(new)


def test_a_dump_holds_the_table(tmp_path: Path) -> None:
    pipeline = insert(default_pipeline(parse_target("cpu-fp32")), FoldNorms(), before="rewrite-kv-cache")
    pipeline = insert(pipeline, RotateHadamard(online=("linears",)), before="rewrite-kv-cache")
    qcompile.compile(tiny("llama"), "cpu-fp32", passes=pipeline, dump=tmp_path, max_context=8, engine="torch_cpu")
    (file,) = tmp_path.glob("*.spaces.txt")
    assert file.name.endswith("_rotate-hadamard.spaces.txt")
    text = file.read_text()
    assert text.startswith("rotate-hadamard{online=linears}")
    assert {cells(text, space)[1] for space in ("embedding", "keys", "linear_4")} == {"32", "8", "48"}
    qcompile.compile(tiny("llama"), "cpu-fp32", dump=tmp_path, max_context=8, engine="torch_cpu")
    assert not list(tmp_path.glob("*.spaces.txt")), "a later dump leaves nothing of an earlier one"


def test_the_recorder_measures_on_what_it_is_given() -> None:
    graph, ctx = outlier_graph()
    asked = []

    def inputs(measured: object) -> ExampleInputs:
        asked.append(measured)
        return ExampleInputs(graph.interface.examples)

    recorder = MomentsRecorder(inputs)
    for seed in (0, 1):
        recorder.before(graph)
        run_pipeline(graph, [RotateHadamard(seed=seed)], ctx)
        assert recorder.after(graph, "rotate") is not None
    assert len(asked) == 3, "what one pass leaves is not measured again before the next"


def test_moments_without_tokens_are_not_a_number() -> None:
    graph, _ = outlier_graph()
    assert str(measure_moments(graph, ExampleInputs({"x": torch.zeros(2, 64)}))["linear"].peak) == "nan"
