"""compile, save, load, generate: whole models, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import CapacityError, CoverageError, FormatError, OptionError, PipelineError, QCompileError, TargetError, WeightError
from tests.listings import without_logs
from tests.models import CAUSAL_FAMILIES, OTHER_FAMILIES, example_inputs, tiny
from tests.passes.helpers import Gated

NEW_TOKENS = 30
# Ragged, longer than the sliding windows (5), none of them special.
PROMPTS = [[3, 14, 15, 92, 65, 35], [89, 79, 32], [38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19], [71], [69, 39, 93, 75, 10, 58, 20]]


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """What Hugging Face's own `generate` answers."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("target", ["cpu-fp32", "reference-fp32"])
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_causal_families_give_the_same_tokens_through_the_compiled_cache(family: str, target: str) -> None:
    model = tiny(family)
    compiled = qcompile.compile(model, target, max_batch=len(PROMPTS), max_context=64)
    assert compiled.generate(PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True) == [greedy(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_causal_families_give_the_same_logits_with_padding_on_either_side(family: str) -> None:
    model = tiny(family)
    compiled = qcompile.compile(model, "cpu-fp32", max_batch=2, max_context=64)
    ids = torch.tensor([[0, 0, 7, 8, 9, 10], [3, 4, 5, 6, 0, 0]])
    mask = (ids != 0).long()
    padded = compiled(ids, attention_mask=mask)["logits"]
    for row in range(2):
        real = mask[row].bool()
        with torch.no_grad():
            expected = model(ids[row : row + 1, real]).logits[0]
        assert (padded[row, real] - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert bool(torch.isfinite(padded[row]).all())


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_give_the_same_outputs(family: str) -> None:
    model = tiny(family)
    inputs = example_inputs(family)
    compiled = qcompile.compile(model, "cpu-fp32", example_inputs=inputs)
    with torch.no_grad():
        expected = model(**inputs)
    got = compiled(**inputs)
    assert set(got) <= set(expected)
    for name, tensor in got.items():
        assert (tensor - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize(
    "target",
    ["cpu-int8", "cpu-int4", "cpu-bf16", "cpu-fp32-kv16", "cpu-fp32-kvfp8", "reference-int8-kv8", "reference-int4", "reference-bf16"],
)
def test_every_scheme_agrees_with_its_own_graph(target: str) -> None:
    """What the engine computes is what the graph says, run node by node."""
    compiled = qcompile.compile(tiny("llama"), target, max_batch=3, max_context=32)
    bound = 2e-2 if "bf16" in target else 1e-3 if "kv16" in target else 1e-4
    assert_graph_and_engine_agree(compiled, torch.tensor([PROMPTS[0], PROMPTS[2][:6]]), bound)


def test_a_packed_cache_costs_what_it_says_and_stays_close() -> None:
    """Head size 8: 4 bytes of codes, scale and least value at 4 bits; results do not depend on how the prompt was cut."""
    exact = qcompile.compile(tiny("llama"), "reference-fp32", max_context=32)
    options = {"cache_keys": "int4 g64 asym", "cache_values": "int4 g64 asym", "cache_sinks": 0, "cache_window": 0}
    packed = qcompile.compile(tiny("llama"), "reference-fp32-kv4", max_context=32, **options)
    assert exact.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert packed.kv_bytes_per_token == 2 * 2 * 2 * (4 + 4)
    ids = torch.tensor([PROMPTS[0]])
    expected, got = exact(ids)["logits"], packed(ids)["logits"]
    assert 0 < (got - expected).abs().max() <= 0.2 * expected.abs().max()
    engine_tokens = packed.generate(ids, max_new_tokens=6)
    whole = packed(torch.tensor([[*PROMPTS[0], *engine_tokens[0][:-1]]]))["logits"][0].argmax(-1)
    assert whole[len(PROMPTS[0]) - 1 :].tolist() == engine_tokens[0]


def assert_graph_and_engine_agree(compiled: CompiledModel, ids: torch.Tensor, bound: float) -> None:
    """The engine's logits within `bound` of the largest that the graph itself computes over an empty cache."""
    graph, (batch, length) = compiled.graph, ids.shape
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "positions": torch.arange(length).repeat(batch, 1),
        "page_table": torch.arange(batch, dtype=torch.int32).view(batch, 1),
    }
    states = {
        node.name: torch.zeros(batch, 2, length, node.meta["val"].shape[3], dtype=node.meta["val"].dtype)
        for node in graph.placeholders
        if node.name not in inputs
    }
    expected = graph.run([(inputs | states)[node.name] for node in graph.placeholders])[0]
    got = compiled(ids)["logits"]
    assert (got.float() - expected.float()).abs().max() <= bound * expected.abs().max()


@pytest.fixture(scope="module")
def tiny_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved int4 artifact of a tiny llama."""
    path = tmp_path_factory.mktemp("artifacts") / "tiny"
    qcompile.compile(tiny("llama"), "cpu-int4", max_batch=3, max_context=64).save(path)
    return path


def test_a_saved_artifact_gives_the_same_tokens(tiny_int4: Path) -> None:
    compiled = qcompile.compile(tiny("llama"), "cpu-int4", max_batch=3, max_context=64)
    loaded = qcompile.load(tiny_int4, max_batch=3, max_context=64)
    assert loaded.generate(PROMPTS, max_new_tokens=8) == compiled.generate(PROMPTS, max_new_tokens=8)
    assert without_logs(loaded.graph.text()) == without_logs(compiled.graph.text())
    assert loaded.report() == loaded.report()
    assert (loaded.bits_per_weight, loaded.weight_bytes) == (compiled.bits_per_weight, compiled.weight_bytes)


def test_serving_more_sequences_does_not_change_what_is_saved(tiny_int4: Path, tmp_path: Path) -> None:
    loaded = qcompile.load(tiny_int4, max_batch=7, max_context=64)
    assert len(loaded.generate([[5, 6]] * 7, max_new_tokens=3, ignore_eos=True)) == 7
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "plan.json").read_bytes() == (tiny_int4 / "plan.json").read_bytes()


def test_bits_per_weight_count_everything_stored(tiny_int4: Path) -> None:
    # d = 32 and 48 columns are one group each: 4 bits and 16 / 32 or 16 / 48 for the scale; the head has 8 bits and 16 / 32.
    per_layer = {32: 32 + 16 + 16 + 32 + 48 + 48, 48: 32}
    bits = 2 * sum(rows * (columns * 4 + 16) for columns, rows in per_layer.items()) + 100 * (32 * 8 + 16)
    elements = 2 * sum(rows * columns for columns, rows in per_layer.items()) + 100 * 32
    assert qcompile.load(tiny_int4).bits_per_weight == pytest.approx(bits / elements)


def test_two_compilations_give_the_same_bytes(tiny_int4: Path, tmp_path: Path) -> None:
    qcompile.compile(tiny("llama"), "cpu-int4", max_batch=3, max_context=64).save(tmp_path / "again")
    for path in sorted(tiny_int4.rglob("*")):
        other = tmp_path / "again" / path.relative_to(tiny_int4)
        if path.name == "manifest.json":
            first, second = (json.loads(item.read_text()) for item in (path, other))
            for manifest in (first, second):
                manifest.pop("sha256", None)
                for record in manifest["passes"]:
                    record["seconds"] = 0
            assert first == second
        elif path.is_file():
            assert path.read_bytes() == other.read_bytes(), path.name


def test_an_artifact_runs_without_the_models_code(tiny_int4: Path) -> None:
    program = f"""
import sys, qcompile
model = qcompile.load({str(tiny_int4)!r}, max_batch=1, max_context=64)
print(model.generate([[3, 14, 15]], max_new_tokens=4))
model({{}} if False else __import__("torch").tensor([[3, 14, 15]]))
foreign = [name for name in sys.modules if name.split(".")[0] in ("transformers", "triton", "onnx", "networkx", "gguf")]
rooms = [name for name in sys.modules if name.startswith(("qcompile.passes", "qcompile.codegen", "qcompile.frontend"))]
assert not foreign and not rooms, (foreign, rooms)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")


def test_ignore_group_size_and_symmetry_are_heeded() -> None:
    compiled = qcompile.compile(tiny("llama"), "cpu-int4", group_size=16, symmetric=False, ignore=["down_proj", "re:layers\\.0\\..*q_proj"])
    rows = {row.weight: row for row in compiled.coverage}
    assert rows["model.layers.1.self_attn.q_proj.weight"].format == "int4 g16 asym fp16"
    assert rows["model.layers.0.self_attn.q_proj.weight"].reason == "ignored by pattern 're:layers\\\\.0\\\\..*q_proj'"
    assert rows["model.layers.1.mlp.down_proj.weight"].format == "fp32"
    assert rows["lm_head.weight"].format == "int8 g32 sym fp16"
    assert "embeddings stay in high precision" in rows["model.embed_tokens.weight"].reason


def test_formats_of_weights_and_activations_are_heeded() -> None:
    compiled = qcompile.compile(
        tiny("llama"), "cpu-w4a8", recipe="nearest", weight_format="int3 g16 sym int8",
        activation_group_size=16, activation_symmetric=False, activation_clip=0.9,
    )  # fmt: skip
    rows = [row for row in compiled.coverage if row.weight == "model.layers.0.self_attn.q_proj.weight"]
    assert [row.format for row in rows] == ["int3 g16 sym int8"]
    formats = {row.operator: row.format for row in compiled.coverage if row.operator.endswith("_asym")}
    assert {"norm_quantize_asym", "add_norm_quantize_asym", "gated_quantize_asym"} <= set(formats)
    assert set(formats.values()) == {"int8 g16 asym dynamic clip 0.9"}


def test_activations_are_static_by_option() -> None:
    compiled = qcompile.compile(tiny("llama"), "cpu-w8a8", recipe="nearest", activation_static=True, calibration=torch.tensor([[5, 6, 7]]))
    assert compiled.graph.calls(torch.ops.qcompile.quantize_static.default)
    assert not compiled.graph.calls(torch.ops.qcompile.quantize_activation.default, torch.ops.qcompile.norm_quantize.default)


def test_head_and_embedding_are_quantized_by_option() -> None:
    compiled = qcompile.compile(tiny("llama"), "cpu-int8", quantize_head=True, quantize_embedding=True)
    formats = {row.operator: row.format for row in compiled.coverage if row.weight in ("lm_head.weight", "model.embed_tokens.weight")}
    assert formats == {"quantized_linear": "int8 channel sym fp16", "quantized_embedding": "int8 channel sym fp16"}
    assert len(compiled.generate([[5, 6]], max_new_tokens=3, ignore_eos=True)[0]) == 3


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-int4", "reference-int4"])
def test_a_quantized_head_tied_to_a_quantized_embedding_shares_its_codes(target: str) -> None:
    """qwen2 ties them: one rounding, two readers, and the engine must not mistake one's form for the other's."""
    compiled = qcompile.compile(tiny("qwen2"), target, quantize_head=True, quantize_embedding=True)
    assert sum(name.endswith("embed_tokens.weight.codes") for name in compiled.graph.constants) == 1
    assert_graph_and_engine_agree(compiled, torch.tensor([PROMPTS[0]]), 1e-4)


def test_strict_accepts_choices_and_refuses_what_had_to_be_left_alone() -> None:
    qcompile.compile(tiny("llama"), "cpu-int4", strict=True, ignore=["down_proj"])
    with pytest.raises(
        CoverageError, match=r"strict: expected a kernel for every operator, got 2 left alone:\n  moe_experts .*three dimensions"
    ):
        qcompile.compile(tiny("mixtral"), "cpu-int4", strict=True)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"target": "cpu-int9"}, TargetError, "scheme 'int9' is not served on cpu; expected one of cpu-fp32"),
    ({"target": "cpu-int4", "recipe": "magic"}, PipelineError, "recipe 'magic': expected one of best, nearest"),
    ({"target": "cpu-int4", "group_size": 1}, FormatError, "group_size=1: expected -1 .* or at least 2"),
    ({"target": "cpu-fp32", "group_size": 64}, FormatError, "scheme fp32: expected quantized weights for group_size"),
    ({"target": "cpu-int4", "activation_static": True}, FormatError, "expected quantized activations for activation_static"),
    ({"target": "cpu-w8a8", "activation_clip": 2.0}, FormatError, "clip=2.0: expected a share of the range"),
    ({"target": "cpu-fp32-kv4", "max_context": 95}, FormatError, "cache kv4: expected max_context of at least 96, got 95"),
    ({"target": "cpu-fp32", "prefill_chunk": 0}, CapacityError, "prefill_chunk=0: expected at least one token"),
    ({"target": "cpu-int4", "weight_format": "int4"}, FormatError, "expected a format like 'int4 g64 sym fp16', got 'int4'"),
    ({"target": "cpu-int4", "ignore": "down_proj"}, OptionError, "ignore='down_proj': expected a list of names"),
    ({"target": "cpu-int4", "recipes": "best"}, OptionError, "option 'recipes': expected a parameter of the function, or one of weight"),
    ({"target": "cpu-int4", "passes": "canonicalize,rotate"}, PipelineError, "unknown pass 'rotate'"),
    ({"target": "cpu-int4", "disable": ["rotate"]}, PipelineError, "disabled pass 'rotate': expected one of"),
])  # fmt: skip
def test_options_that_make_no_sense_say_so(options: dict[str, Any], error: type[QCompileError], message: str) -> None:
    with pytest.raises(error, match=message):
        qcompile.compile(tiny("llama"), **options)


def test_nan_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(WeightError, match=r"model.layers.1.mlp.up_proj.weight\[2, 3\] is nan: expected finite weights"):
        qcompile.compile(model, "cpu-int4", recipe="nearest").save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Interruption(KeyboardInterrupt):
    """Stands in for Ctrl-C in the middle of writing."""


def test_an_interrupted_save_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = qcompile.compile(tiny("llama"), "cpu-int4")

    def interrupt(*_: object) -> None:
        raise Interruption

    monkeypatch.setattr("qcompile.ir.constants.RoundedSource.load", interrupt)
    with pytest.raises(Interruption):
        compiled.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_capacity_is_an_error_before_anything_is_computed(tiny_int4: Path) -> None:
    model = qcompile.load(tiny_int4, max_context=16)
    with pytest.raises(CapacityError, match=r"expected a prompt of at most 16 tokens, got 17; shorten it, or load with max_context="):
        model.generate([[5] * 17])
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    assert qcompile.load(tiny_int4, kv_bytes=256 * 40 + 4).max_context == 40  # an entry of the page table
    assert qcompile.load(tiny_int4, kv_bytes=256 * 40 + 3).max_context == 39
    with pytest.raises(CapacityError, match="expected kv_bytes of at least 260"):
        qcompile.load(tiny_int4, kv_bytes=100)


def test_a_module_that_is_no_language_model_does_not_generate() -> None:
    compiled = qcompile.compile(Gated(), "cpu-int4", example_inputs=torch.randn(2, 32))
    with pytest.raises(QCompileError, match="generate: expected a causal language model"):
        compiled.generate("text")
    assert compiled(torch.randn(7, 32)).shape == (7, 32)


def test_padding_and_shapes_of_plain_calls_are_checked(tiny_int4: Path) -> None:
    with pytest.raises(QCompileError, match=r"attention_mask: expected integers \[B, S\] like input_ids, got torch.int64 \(1, 3\)"):
        qcompile.load(tiny_int4)(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 3, dtype=torch.long))


def test_positions_that_would_skip_tokens_are_refused(tiny_int4: Path) -> None:
    compiled, ids, mask = qcompile.load(tiny_int4), torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]])
    given = compiled(ids, attention_mask=mask, position_ids=torch.tensor([[1, 0, 1, 2]]))["logits"]
    assert torch.equal(given[:, 1:], compiled(ids, attention_mask=mask)["logits"][:, 1:])
    with pytest.raises(QCompileError, match=r"position_ids: expected 0, 1, 2 … over the real tokens of each row, got others"):
        compiled(ids, position_ids=torch.tensor([[4, 5, 6, 7]]))


@pytest.fixture
def plain() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield Gated().eval()
    torch._dynamo.reset()


def test_torch_compile_serves_a_forward_pass(plain: nn.Module) -> None:
    optimized = torch.compile(plain, backend="qcompile", options={"target": "cpu-fp32"})
    with torch.no_grad():
        for rows in (2, 5, 3):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(optimized(x), plain(x), atol=1e-5, rtol=0)


def test_torch_compile_needs_a_target(plain: nn.Module) -> None:
    with pytest.raises(Exception, match=r'torch.compile: expected options=\{"target": "cpu-int4"\}'), torch.no_grad():
        torch.compile(plain, backend="qcompile")(torch.randn(2, 32))


def test_a_dump_has_a_listing_for_every_pass_that_changed_something(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        qcompile.compile(tiny("llama"), "cpu-int4", dump=tmp_path / name, check=True)
        records = json.loads((tmp_path / name / "passes.json").read_text())
        for record in records:
            record["seconds"] = 0
        timed = ("passes.json", "report.html")
        files = {path.name: path.read_text() for path in sorted((tmp_path / name).iterdir()) if path.is_file() and path.name not in timed}
        texts.append((files, records))
    assert texts[0] == texts[1]
    files, records = texts[0]
    written = {name[:3] for name in files if name.endswith(".txt")}
    assert written == {"000", "pip"} | {f"{record['index'] + 1:03d}" for record in records if record["changed"]}
    assert all(
        record["max_error"] <= 1e-9
        for record in records
        if record["changed"] and record["name"] in ("canonicalize", "raise-patterns", "rewrite-kv-cache")
    )
