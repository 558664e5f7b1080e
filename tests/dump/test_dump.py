"""What a compilation leaves in a dump."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.codegen.triton import build
from qcompile.codegen.triton.gates import Usage
from qcompile.dump.reader import Dump
from tests.dump.conftest import TARGET


def _contents(directory: Path) -> dict[str, Any]:
    """Every file by name, without the seconds of the passes; the report is made of the others."""
    files: dict[str, Any] = {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}
    assert files.pop("report.html").startswith("<!doctype html>")
    files["passes.json"] = [row | {"seconds": 0} for row in json.loads(files["passes.json"])]
    return files


def test_the_heading_says_what_was_compiled(dumped: Path) -> None:
    dump = Dump.open(dumped)
    assert (dump.complete, dump.heading.model, dump.heading.target) == (True, "LlamaForCausalLM", TARGET)
    assert dump.heading.pipeline == ",".join(row["spec"] for row in dump.passes) == dump.path.joinpath("pipeline.txt").read_text().strip()


def test_graphs_are_the_listings_node_by_node(dumped: Path) -> None:
    dump = Dump.open(dumped)
    assert [listing.name for listing in dump.listings] == ["000_input", *(row["listing"][:-4] for row in dump.passes if row["listing"])]
    for listing in dump.listings:
        rows = [re.split(r" {2,}", line)[0] for line in dump.text(listing.name).splitlines()]
        assert [node["call"] for node in listing.nodes] == rows


def test_a_node_that_was_left_alone_is_written_once(dumped: Path) -> None:
    dump = Dump.open(dumped)
    for before, after in zip(dump.listings, dump.listings[1:], strict=False):
        kept = {id(node) for node in before.nodes} & {id(node) for node in after.nodes}
        changed = sum(line.startswith("+") for line in dump.diff(after.name).splitlines()[2:])
        assert len(after.nodes) - len(kept) >= changed > 0, "a changed line has a new record"
        assert kept, "not every node has"


def test_repeated_layers_fold(dumped: Path) -> None:
    nodes = Dump.open(dumped).listings[-1].nodes
    layers = [Counter(node["folded"] for node in nodes if node["layer"] == layer) for layer in (0, 1)]
    alike = layers[0] & layers[1]
    assert {name.rpartition(".input_layernorm")[1] for layer in layers for name in layer - alike} == {".input_layernorm"}, "one norm fuses"
    assert alike["model.layers.*.mlp.down_proj: integer_linear"] == 1
    assert alike.total() > 30
    assert {node["folded"] for node in nodes if node["layer"] is None} >= {"lm_head: quantized_linear", "input_ids"}


def test_a_constant_knows_what_was_done_to_it(dumped: Path) -> None:
    nodes = {node["constant"]: node for node in Dump.open(dumped).listings[-1].nodes}
    log = nodes["model.layers.1.self_attn.q_proj.weight.codes"]["log"]
    assert [entry.partition("(")[0] for entry in log] == ["times", "basis", "quantize"], "the norm's gain, the rotation, the rounding"
    assert nodes["model.layers.1.self_attn.q_proj.weight.codes"]["bytes"] == 32 * 16


def test_kernels_name_nodes_of_the_last_listing(dumped: Path) -> None:
    dump = Dump.open(dumped)
    names = {node["name"] for node in dump.listings[-1].nodes} | {"gather_last"}  # which plans add before the head
    kernels = {row["name"]: row for row in dump.kernels}
    assert all(set(row["nodes"]) <= names for row in dump.kernels)
    assert len(kernels["torch_cpu.integer_linear"]["nodes"]) == 14
    assert kernels["torch_cpu.integer_linear"]["file"] is None


def test_products_are_those_of_the_artifact(dumped: Path) -> None:
    dump = Dump.open(dumped)
    assert [row["format"] for row in dump.coverage if row["operator"] == "integer_linear"] == ["int4 g16 sym fp16"] * 14
    assert {(note["pass"], note["node"], note["chosen"]) for note in dump.notes} >= {("quantize-weights", "embedding", True)}
    assert [(row["layer"], row["keys"]) for row in dump.cache] == [(0, "fp32"), (1, "fp32")]
    stored = 15360 * (4 + 16 / 16) + 3200 * (8 + 16 / 32)
    assert dump.sizes["bits_per_weight"] == pytest.approx(stored / 18560), "4 bits, a scale of 16 for 16; the head 8, and for 32"


def test_an_outlier_vanishes(dumped: Path) -> None:
    """The loud channel is in the activations before the rotation and in none after it; rounding moves it nowhere."""
    activations = {entry["name"]: entry for entry in Dump.open(dumped).distributions["activations"]}
    entry = activations["model.layers.0.self_attn.q_proj.weight"]
    stages = {stage["listing"].partition("_")[2]: stage for stage in entry["stages"]}
    before, after, rounded = stages["fold-norms"], stages["rotate-hadamard"], stages["quantize-activations"]
    assert before["max_over_rms"] > 4 > 3 > after["max_over_rms"]
    assert before["kurtosis"] > 15 > 5 > after["kurtosis"]
    assert before["channel_max"].index(max(before["channel_max"])) == 5
    assert max(after["channel_max"]) < max(before["channel_max"])
    assert rounded["kurtosis"] == pytest.approx(after["kurtosis"], rel=0.02)
    assert sum(after["histogram"]["counts"]) == sum(before["histogram"]["counts"]) > 0
    assert entry["layer"] == 0


def test_weights_have_a_stage_for_every_change(dumped: Path) -> None:
    weights = {entry["name"]: entry for entry in Dump.open(dumped).distributions["weights"]}
    assert set(weights) == {
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
    }
    stages = weights["model.layers.0.mlp.down_proj.weight"]["stages"]
    assert [stage["listing"].partition("_")[2] for stage in stages] == ["fold-norms", "rotate-hadamard", "quantize-weights"]
    assert all(sum(stage["histogram"]["counts"]) == 32 * 48 for stage in stages)


def test_a_model_without_layers_has_distributions_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"only": nn.Linear(32, 4)})
    model.forward = lambda x: model["only"](x)  # type: ignore[method-assign]
    qcompile.compile(
        model, "cpu-int4", recipe="nearest", example_inputs=torch.randn(2, 32), dump=tmp_path, group_size=32, engine="torch_cpu"
    )
    (entry,) = Dump.open(tmp_path).distributions["weights"]
    assert (entry["name"], entry["layer"], len(entry["stages"])) == ("only.weight", None, 2)
    # A row has one scale: 15 levels of 4 bits, none between them.
    assert sum(count > 0 for count in entry["stages"][1]["histogram"]["counts"]) <= 4 * 15


def test_a_dump_is_the_same_when_the_work_was_done_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 8)), torch.randn(4, 32)
    pipeline = (
        "canonicalize,raise-patterns,fold-constants,remove-dead-code,convert-dtype,insert-low-rank-branch{rank=4},"
        "quantize-weights{rounding=gptq},fuse-dequantize,remove-dead-code,lower-to-kernels,plan-memory"
    )
    for name in ("first", "second"):
        qcompile.compile(
            model,
            "cpu-int4",
            passes=pipeline,
            example_inputs=example,
            calibration=[example],
            dump=tmp_path / name,
            group_size=16,
            engine="torch_cpu",
        )
    assert list((tmp_path / "cache" / "work").iterdir()), "results were kept"
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")


def test_a_dump_is_complete_when_kernels_were_built_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    built: list[int] = []

    def compile_jobs(jobs: list[dict[str, Any]], workers: int) -> dict[str, build.Binary]:
        """What a compiler would make, without one."""
        del workers
        built.append(len(jobs))
        classes = frozenset({"mma", "wgmma", "cp.async", "load128"})
        return {job["key"]: build.Binary(job["key"].encode(), "main", 2048, Usage(96, 0, classes)) for job in jobs}

    monkeypatch.setattr(build, "compile_jobs", compile_jobs)
    torch.manual_seed(0)
    model, example = nn.Linear(64, 64), torch.randn(2, 64)
    for name in ("first", "second"):
        qcompile.compile(model, "sm90-int4", recipe="nearest", example_inputs=example, dump=tmp_path / name)
    assert built[0] > 0
    assert sum(built[1:]) == 0, "the second time nothing was built"
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")
    dump = Dump.open(tmp_path / "second")
    assert all(dump.kernel_source(row).startswith('"""') for row in dump.kernels if row["launches"])
    assert {(launch["registers"], launch["shared_bytes"]) for row in dump.kernels for launch in row["launches"]} == {(96, 2048)}
