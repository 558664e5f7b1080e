"""A plan and the compilation that follows it: the same nodes, formats, reasons and bytes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.planning.result import CompilationPlan
from tests.models import example_inputs, tiny

TOKENS = torch.randint(3, 100, (4, 48), generator=torch.Generator().manual_seed(0))
CLOSE = 0.05
"""What a plan may be off by."""


def _rows(coverage: Any) -> list[dict[str, Any]]:
    """Everything but names of nodes."""
    return [{key: value for key, value in asdict(row).items() if key != "node"} for row in coverage]


def _saved(compiled: qcompile.CompiledModel, path: Path) -> tuple[int, int]:
    """Bytes of the weights, and of all files but libraries, which are not built for a plan."""
    compiled.save(path)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file() and file.suffix != ".so"]
    return (path / "weights.safetensors").stat().st_size, sum(sizes)


def _both(family: str, target: str, path: Path, **options: Any) -> tuple[CompilationPlan, qcompile.CompiledModel, tuple[int, int]]:
    options = {"calibration": TOKENS, "max_context": 128} | options
    plan = qcompile.plan(tiny(family), target, **options)
    compiled = qcompile.compile(tiny(family), target, **options)
    return plan, compiled, _saved(compiled, path / "artifact")


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("llama", "cpu-w4a8-kv4", {"quantize_head": True, "quantize_embedding": True, "ignore": ["re:mlp"]}),
        ("llama", "cpu-nf4-kv4-xquant", {"weight_format": "nf4 g36 sym int8"}),
        ("mixtral", "cpu-w8a8", {}),
        ("gemma2", "cpu-mxfp4-kv2-kivi", {}),
        ("opt", "onnx-int4", {}),
    ],
)
def test_rounding_to_nearest_is_what_was_planned(family: str, target: str, options: dict[str, Any], tmp_path: Path) -> None:
    plan, compiled, (weights, total) = _both(family, target, tmp_path, recipe="nearest", **options)
    assert plan.size.weights == weights
    assert plan.size.total - plan.size.binaries == pytest.approx(total, rel=CLOSE)
    assert _rows(plan.coverage) == _rows(compiled.coverage)
    assert [row.reason for row in plan.left_alone] == [row.reason for row in compiled.coverage if row.reason]
    assert list(plan.cache) == compiled.cache_layers
    assert plan.bits_per_weight == compiled.bits_per_weight
    assert plan.pipeline == compiled.contents.pipeline
    assert (plan.choices, plan.alternatives) == ((), ())


@pytest.mark.parametrize(("family", "target"), [("llama", "cpu-w8a8-kv3-kvquant"), ("qwen2", "cpu-int4"), ("gemma2", "cpu-w4a4-kv4")])
def test_the_best_recipe_is_one_of_what_was_planned(family: str, target: str, tmp_path: Path) -> None:
    """Weights and data decide whether the stream is turned: the compilation is one of the two outlines, to the byte."""
    plan, compiled, (weights, total) = _both(family, target, tmp_path)
    sizes = [plan.size, *plan.alternatives]
    chosen = [size for size in sizes if size.weights == weights]
    assert chosen
    assert chosen[0].total - plan.size.binaries == pytest.approx(total, rel=CLOSE)
    low, high = (size - plan.size.binaries for size in plan.size_range)
    assert low * (1 - CLOSE) <= total <= high * (1 + CLOSE)
    assert sum(layer.bytes_per_token for layer in plan.cache) == compiled.kv_bytes_per_token
    assert sum(layer.table_bytes for layer in plan.cache) == sum(layer.table_bytes for layer in compiled.cache_layers)
    if weights == plan.size.weights:
        assert _rows(plan.coverage) == _rows(compiled.coverage)
    reads = {item.spec.partition("{")[0] for item in plan.passes if item.reads_values}
    assert reads & {"quantize-weights", "assign-kv-formats", "rewrite-kv-cache"}


def test_passes_that_read_data_leave_the_same_shapes(tmp_path: Path) -> None:
    reading = (
        "reorder-channels", "scale-keys", "scale-salient-weights{steps=2}", "learn-rotation{steps=2}", "split-outliers{columns=3}",
        "insert-low-rank-branch{rank=4}",
    )  # fmt: skip
    after = "quantize-activations,quantize-weights{rounding=gptq},fuse-residual-norm,fuse-quantize-dequantize,fuse-dequantize"
    passes = f"canonicalize,raise-patterns,{','.join(reading)},rewrite-kv-cache,convert-dtype,{after},lower-to-kernels,plan-memory"
    plan, compiled, (weights, _) = _both("llama", "cpu-w8a8", tmp_path, passes=passes, activation_static=True)
    assert plan.size.weights == weights
    assert _rows(plan.coverage) == _rows(compiled.coverage)
    assert [item.spec for item in plan.passes if item.reads_values] == [*reading, "quantize-activations", "quantize-weights{rounding=gptq}"]


def test_a_network_of_convolutions(tmp_path: Path) -> None:
    """Batch norms are folded, static ranges and biases have their places; data is asked for where the model brings none."""
    options: dict[str, Any] = {"example_inputs": example_inputs("resnet")}
    data = [example_inputs("resnet")]
    plan = qcompile.plan(tiny("resnet"), "cpu-w8a8", calibration=data, **options)
    compiled = qcompile.compile(tiny("resnet"), "cpu-w8a8", calibration=data, **options)
    weights, total = _saved(compiled, tmp_path / "artifact")
    assert plan.size.weights == weights
    assert plan.size.total - plan.size.binaries == pytest.approx(total, rel=CLOSE)
    assert _rows(plan.coverage) == _rows(compiled.coverage)
    assert plan.speed is None
    assert any("compile will ask for calibration=" in note for note in qcompile.plan(tiny("resnet"), "cpu-w8a8", **options).notes)
