"""Blame: figures against direct evaluations, planted faults by name, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import frontend
from qcompile.compiled import CompiledModel
from qcompile.dump.blame import Blame, heat
from qcompile.dump.reader import Dump
from qcompile.errors import ArtifactError, SourceError
from qcompile.evaluation import evaluate, logits_of
from qcompile.frontend.loaded import Loaded
from qcompile.ir.constants import tensor_constant
from qcompile.ir.graph import Graph
from qcompile.passes.attribution import usual_budget
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.pipelines import default_pipeline
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.quant.cache_format import CACHES
from qcompile.quant.scheme import FP32
from qcompile.target import parse_target
from tests.models import example_inputs, tiny
from tests.passes.faults import BrokenFusion, SkippingRotation, WrongScale

TOKENS = torch.randint(3, 100, (2, 48), generator=torch.Generator().manual_seed(5))
WEIGHTS = ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight")
LINEARS = 15  # seven in each of two layers, and the head
EVERYTHING = {"budget": 1000, "tokens": TOKENS, "windows": 2}


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """Tracing takes most of the time, and the same few models are compiled and blamed again and again."""
    load, kept = frontend.load, dict[nn.Module, Loaded]()

    def remembering(model: Any, **options: Any) -> Loaded:
        if not isinstance(model, nn.Module):
            return load(model, **options)
        if model not in kept:
            kept[model] = load(model, **options)
        return Loaded(kept[model].graph.clone(), kept[model].assets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "load", remembering)
        yield


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def plain(llama: nn.Module) -> CompiledModel:
    return compiled(llama, "cpu-fp32")


@pytest.fixture(scope="module")
def int4(llama: nn.Module) -> CompiledModel:
    return compiled(llama, "cpu-int4")


@pytest.fixture(scope="module")
def int4_blame(int4: CompiledModel, llama: nn.Module) -> Blame:
    return qcompile.blame(int4, llama, **EVERYTHING)


def compiled(model: Any, target: str, **options: Any) -> CompiledModel:
    return qcompile.compile(model, target, **{"recipe": "nearest", "max_context": 64, "max_batch": 2, "engine": "torch_cpu"} | options)


def kl(model: CompiledModel, plain: CompiledModel) -> float:
    found = evaluate(logits_of(model), TOKENS, logits_of(plain)).kl
    assert found is not None
    return found


def swapped(target: str, old: str, new: Pass) -> list[Pass]:
    return [new if step.name == old else step for step in default_pipeline(parse_target(target), "nearest")]


def cell(blame: Blame, node: str) -> Any:
    return next(item for item in blame.cells if item.node == node)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_off_and_alone_are_what_compiling_without_and_with_nothing_else_gives(
    weight: str, int4_blame: Blame, int4: CompiledModel, plain: CompiledModel, llama: nn.Module
) -> None:
    without = compiled(llama, "cpu-int4", ignore=[weight])
    with_only = compiled(llama, "cpu-int4", ignore=[f"re:^(?!{weight})"])
    found = cell(int4_blame, weight)
    assert int4_blame.total == pytest.approx(kl(int4, plain), rel=1e-3)
    assert found.off == pytest.approx(kl(int4, plain) - kl(without, plain), rel=1e-2)
    assert found.alone == pytest.approx(kl(with_only, plain), rel=1e-2)


def test_shares_add_up_to_the_whole_and_evaluations_are_bounded(int4_blame: Blame) -> None:
    assert len(int4_blame.cells) == int4_blame.quantizers == LINEARS
    assert abs(int4_blame.remainder) < 0.05 * int4_blame.total
    assert int4_blame.evaluations <= usual_budget(LINEARS, 1000)
    assert int4_blame.floor < 1e-9
    assert int4_blame.steps == ()


def test_each_kind_is_what_a_pipeline_without_it_gives(llama: nn.Module, plain: CompiledModel) -> None:
    target = "cpu-w4a8-kv4-token"
    options = {"cache_sinks": 0, "cache_window": 0}
    full = compiled(llama, target, **options)
    found = qcompile.blame(full, llama, tokens=TOKENS, windows=2, budget=9)
    without = {
        "weights": compiled(llama, target, disable=["quantize-weights"], **options),
        "activations": compiled(llama, target, disable=["quantize-activations"], **options),
        "cache": compiled(llama, "cpu-w4a8"),
    }
    assert found.evaluations <= 9
    assert [(item.node, len(item.layers)) for item in sorted(found.cells, key=lambda item: item.kind)] == [("", 8), ("", 2), ("", LINEARS)]
    for item in found.cells:
        lost = kl(full, plain) - kl(without[item.kind], plain)
        assert item.off == pytest.approx(lost, rel=2e-2, abs=2e-5), item.kind


def test_a_budget_bounds_evaluations_and_leaves_groups(int4: CompiledModel, llama: nn.Module) -> None:
    found = qcompile.blame(int4, llama, tokens=TOKENS, budget=12)
    assert found.evaluations <= 12
    assert 1 < len(found.cells) < LINEARS
    assert sum(len(item.layers) for item in found.cells) == LINEARS
    assert sum(heat(found.cells).values()) == pytest.approx(sum(item.share for item in found.cells))


def test_a_wrong_scale_is_named(llama: nn.Module) -> None:
    pipeline = swapped("cpu-int4", "quantize-weights", WrongScale(rounding="nearest"))
    found = qcompile.blame(compiled(llama, "cpu-int4", passes=pipeline), llama, passes=pipeline, tokens=TOKENS)
    worst = found.cells[0]
    assert (worst.layer, worst.kind, worst.step, worst.node) == (1, "weights", "wrong-scale", WrongScale().place)
    assert worst.share > 0.5 * found.total


def test_a_scale_that_was_altered_in_the_artifact_is_named(llama: nn.Module) -> None:
    model, name = compiled(llama, "cpu-int4"), "model.layers.0.mlp.gate_proj.weight"
    scale = model.graph.constants[f"{name}.scale"]
    model.graph.bind(f"{name}.scale", replace(tensor_constant(scale.materialize() * 4), format=scale.format))
    worst = qcompile.blame(model, llama, tokens=TOKENS).cells[0]
    assert (worst.layer, worst.kind, worst.step, worst.node) == (0, "weights", "quantize-weights", name)


def test_what_makes_nan_is_named(llama: nn.Module) -> None:
    model, name = compiled(llama, "cpu-int4"), "model.layers.1.self_attn.o_proj.weight"
    scale = model.graph.constants[f"{name}.scale"]
    broken = scale.materialize().index_fill(0, torch.tensor(3), torch.nan)
    model.graph.bind(f"{name}.scale", replace(tensor_constant(broken), format=scale.format))
    found = qcompile.blame(model, llama, tokens=TOKENS)
    assert found.cells[0].node == name
    assert found.cells[0].off > 0.99 * found.total
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_float_weight_that_was_altered_is_named(llama: nn.Module) -> None:
    model, name = compiled(llama, "cpu-int4"), "model.layers.1.post_attention_layernorm.weight"
    model.graph.bind(name, tensor_constant(model.graph.constants[name].materialize() * torch.linspace(-1, 3, 32)))
    worst = qcompile.blame(model, llama, tokens=TOKENS).cells[0]
    assert (worst.layer, worst.kind, worst.step, worst.node) == (1, "weights", "altered", name)


@dataclass(frozen=True)
class Clipping(QuantizeActivations):
    """Quantizes activations, and cuts off nine tenths of the range of the input of one linear."""

    place: str = "model.layers.1.mlp.down_proj.weight"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        changed = super().run(graph, ctx)
        linear = next(node for node in graph.calls(torch.ops.aten.linear.default) if str(node.args[1].target) == self.place)  # type: ignore[union-attr]
        quantize = linear.args[0].args[0].args[0]  # type: ignore[union-attr]
        quantize.args = (*quantize.args[:4], 0.1)  # type: ignore[union-attr]
        return changed


def test_a_broken_activation_quantizer_is_named(llama: nn.Module) -> None:
    pipeline = swapped("cpu-w8a8", "quantize-activations", Clipping())
    model = compiled(llama, "cpu-w8a8", passes=pipeline)
    found = qcompile.blame(model, llama, passes=pipeline, tokens=TOKENS)
    worst = found.cells[0]
    assert (worst.layer, worst.kind, worst.step) == (1, "activations", "quantize-activations")
    assert worst.group == "input of model.layers.1.mlp.down_proj"
    assert worst.share > 0.5 * found.total
    with pytest.raises(SourceError, match=r"on which its passes make \w+ = qcompile\..*0\.1.*, got .*1\.0.*pass that model, to the ver"):
        qcompile.blame(model, llama, tokens=TOKENS)


def test_a_cache_layer_of_too_few_bits_is_named(llama: nn.Module) -> None:
    fine, coarse = ("int8 g64 sym",) * 2, ("int2 g64 asym",) * 2
    scheme = replace(FP32, cache=replace(CACHES["kv8"], layers=(fine, coarse)))
    found = qcompile.blame(compiled(llama, "cpu-fp32-kv8", scheme=scheme), llama, tokens=TOKENS)
    worst = found.cells[0]
    assert (worst.layer, worst.kind, worst.step, worst.node) == (1, "cache", "rewrite-kv-cache", "cache_attend_packed_1")
    assert worst.share > 0.9 * found.total


def test_a_broken_fusion_is_named(llama: nn.Module) -> None:
    pipeline = swapped("cpu-int4", "fuse-residual-norm", BrokenFusion())
    found = qcompile.blame(compiled(llama, "cpu-int4", passes=pipeline), llama, passes=pipeline, tokens=TOKENS)
    (step,) = found.steps
    assert (step.name, step.is_exact, step.node) == ("broken-fusion", True, "add_rms_norm_2")
    assert step.added > 0.01 * found.total
    assert "which reads model.layers.1.post_attention_layernorm.weight" in step.place
    assert "first at add_rms_norm_2" in str(found)


def test_a_rotation_that_skips_a_weight_is_named(llama: nn.Module) -> None:
    pipeline = default_pipeline(parse_target("cpu-int4"), "best", calibrated=False)
    pipeline = [SkippingRotation() if step.name == "rotate-hadamard" else step for step in pipeline]
    found = qcompile.blame(compiled(llama, "cpu-int4", passes=pipeline), llama, passes=pipeline, tokens=TOKENS)
    (step,) = found.steps
    assert (step.name, step.is_exact) == ("skipping-rotation", True)
    assert step.added > 0.5 * found.total
    assert SkippingRotation().place in step.place


@pytest.mark.parametrize("target", ["cpu-fp32-kv4-xquant", "cpu-fp32-kv4-zip", "cpu-fp32-kv3-kvquant"])
def test_every_kind_of_cache_can_be_switched_off(target: str, llama: nn.Module) -> None:
    data = torch.randint(3, 100, (4, 48))
    window = {} if "kvquant" in target or "xquant" in target else {"cache_window": 4}
    model = qcompile.compile(llama, target, max_context=64, calibration=data, engine="torch_cpu", **window)
    found = qcompile.blame(model, llama, tokens=TOKENS, calibration=data)
    assert [item.layer for item in sorted(found.cells, key=lambda item: item.node)] == [0, 1]
    assert found.floor < 1e-6 < found.total
    assert abs(found.remainder) < 0.1 * found.total


def test_another_dtype_is_a_group_of_its_own(llama: nn.Module) -> None:
    found = qcompile.blame(compiled(llama, "cpu-bf16-kv8"), llama, tokens=TOKENS)
    worst = found.cells[0]
    assert (worst.step, worst.group) == ("convert-dtype", "computing in bf16")
    assert abs(found.remainder) < 0.2 * found.total


def test_a_saved_artifact_and_a_checkpoint_give_the_same(tmp_path: Path, llama: nn.Module, int4: CompiledModel, int4_blame: Blame) -> None:
    int4.save(tmp_path / "artifact")
    llama.save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
    found = qcompile.blame(tmp_path / "artifact", tmp_path / "checkpoint", **EVERYTHING)
    assert [item.node for item in found.cells] == [item.node for item in int4_blame.cells]
    assert found.total == pytest.approx(int4_blame.total, rel=1e-6)


def test_a_module_is_judged_by_noise_over_signal() -> None:
    model, inputs = tiny("resnet"), example_inputs("resnet", batch=3)
    made = qcompile.compile(model, "cpu-w8a8", example_inputs=inputs, calibration=[inputs], engine="torch_cpu")
    found = qcompile.blame(made, model, example_inputs=inputs, inputs=[inputs], calibration=[inputs])
    wanted, got = model(**inputs).last_hidden_state, made(**inputs)["last_hidden_state"]
    assert found.unit == "noise over signal"
    assert {item.kind for item in found.cells} == {"weights", "activations"}
    assert found.floor < 1e-9
    assert "SQNR" in str(found)
    assert float((got - wanted).square().sum() / wanted.square().sum()) < 10 * found.total


def test_what_is_written_is_what_a_report_reads(int4_blame: Blame, llama: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a dump"):
        int4_blame.write(tmp_path)
    compiled(llama, "cpu-int4", dump=tmp_path / "dump")
    unaware = (tmp_path / "dump" / "report.html").read_text()
    written = json.loads(int4_blame.write(tmp_path / "dump").read_text())
    assert Dump.open(tmp_path / "dump").blame == written
    assert (tmp_path / "dump" / "report.html").read_text() != unaware
    assert written["total_kl"] == int4_blame.total
    assert written["evaluations"] == int4_blame.evaluations
    assert set(written["cells"][0]) >= {"layer", "kind", "pass", "node", "off", "alone"}
    assert sum(row["share"] for row in written["cells"]) + written["remainder"] == pytest.approx(written["total_kl"])


def test_the_table_ranks_and_the_map_has_a_line_for_each_layer(int4_blame: Blame) -> None:
    text = str(int4_blame)
    first = int4_blame.cells[0]
    assert text.index(first.node) < text.index(int4_blame.cells[1].node)
    assert "share by layer" in text
    assert f"{int4_blame.evaluations} of at most 1000" in text
    assert f"and {LINEARS - 10} more" in text


def other_weights() -> nn.Module:
    model = tiny("llama")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def nudged() -> nn.Module:
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (other_weights, r"got one with other weights: \d+ of \d+ unquantized weights, first .*; pass the checkpoint"),
        (nudged, r"got one with other weights: 6 of 7 unquantized weights, first model.embed_tokens.weight"),
        (lambda: tiny("qwen2"), r"expected the model that was compiled, on which its passes make .*, got .*; pass that model"),
    ],
)
def test_another_model_is_refused(reference: Any, message: str, int4: CompiledModel) -> None:
    with pytest.raises(SourceError, match=message):
        qcompile.blame(int4, reference(), tokens=TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": TOKENS, "windows": 0}, "at least one window and one evaluation, got windows=0"),
        ({"tokens": TOKENS, "budget": 0}, "at least one window and one evaluation, .*budget=0"),
        ({"tokens": TOKENS[:, :1]}, r"tokens in windows of at least 2"),
        ({"tokens": TOKENS + 100}, "tokens between 0 and 99, got"),
        ({"inputs": [TOKENS]}, "expected tokens for a language model, got inputs"),
    ],
)
def test_data_that_does_not_fit_is_refused(options: dict[str, Any], message: str, int4: CompiledModel, llama: nn.Module) -> None:
    with pytest.raises(SourceError, match=message):
        qcompile.blame(int4, llama, **options)


def test_nothing_to_switch_off_and_no_artifact_are_refused(plain: CompiledModel, llama: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a model with quantizers, got one for cpu-fp32, which rounds nothing"):
        qcompile.blame(plain, llama, tokens=TOKENS)
    with pytest.raises(ArtifactError, match="manifest"):
        qcompile.blame(tmp_path, llama, tokens=TOKENS)


def test_other_calibration_data_is_refused(llama: nn.Module) -> None:
    data: Tensor = torch.randint(3, 100, (2, 16))
    model = compiled(llama, "cpu-w8a8", activation_static=True, calibration=data)
    for other, got in ((None, "got none: .*expected a tokenizer"), (data + 0 * data.flip(0) // 2 - 1, "which is other data")):
        with pytest.raises(SourceError, match=rf"expected the calibration data of the compiled model, .* 2 windows.*{got}"):
            qcompile.blame(model, llama, tokens=TOKENS, calibration=other)
