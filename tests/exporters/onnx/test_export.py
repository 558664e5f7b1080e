"""Graphs as ONNX files, run by onnxruntime: every scheme, cache and profile gives what the graph gives, or is refused by node."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import ExportError
from qcompile.exporters.onnx import check, export
from qcompile.exporters.onnx.check import empty_past, session, step
from qcompile.exporters.onnx.last_tokens import head_of
from qcompile.ir.constants import Constant
from qcompile.ir.records import Assets
from tests.models import example_inputs, tiny

TEXT = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(3))
CLOSE = 1e-4
"""Of results, relative to the largest: the order of sums; codes of tiny models do not turn."""


def compiled(target: str, family: str = "llama", recipe: str = "nearest", **options: Any) -> CompiledModel:
    options |= {"engine": "torch_cpu"} if target.startswith("cpu") else {}
    return qcompile.compile(tiny(family), target, recipe=recipe, calibration=TEXT, max_context=64, max_batch=2, **options)


@pytest.fixture(scope="module")
def int4() -> CompiledModel:
    """With rotations that run, as the default recipe has them."""
    return compiled("cpu-int4", passes=None, recipe="best")


@pytest.mark.parametrize(("target", "profile", "opset"), [
    ("cpu-fp32", "portable", 21), ("cpu-fp32", "ort", 21), ("cpu-int4", "portable", 21), ("cpu-int4", "ort", 23),
    ("cpu-int8-kv16", "portable", 23), ("cpu-int8", "ort", None), ("cpu-w8a8-kv8", "portable", None), ("cpu-w8a8", "ort", 23),
    ("cpu-w4a8-kv8-static", "ort", None), ("cpu-w4a4", "portable", 23), ("cpu-int3-kvfp8", "portable", 23), ("cpu-int2", "ort", None),
    ("cpu-nf4", "portable", None), ("cpu-fp8", "portable", None), ("cpu-mxint8", "ort", None), ("cpu-nvfp4", "portable", 23),
    ("cpu-fp32-kv8-static", "portable", 21),
])  # fmt: skip
def test_schemes_give_what_the_graph_gives(target: str, profile: str, opset: int | None, tmp_path: Path) -> None:
    written = compiled(target).export_onnx(tmp_path / "m.onnx", profile=profile, opset=opset)
    assert written.error is not None
    assert written.error <= CLOSE
    model = onnx.load(written.path)
    assert {item.domain: item.version for item in model.opset_import}[""] == written.opset
    assert opset is None or written.opset == opset
    domains = {node.domain for node in model.graph.node}
    assert domains == ({"", "com.microsoft"} if profile == "ort" else {""})


@pytest.mark.parametrize("options", [
    {"cache_keys": "int4 g64 asym", "cache_values": "int4 g64 sym", "cache_sinks": 0, "cache_window": 0}, {"symmetric": False},
    {"weight_format": "int4 g16 sym int8"}, {"weight_format": "int5 g16 asym fp16"},
    {"weight_format": "int4 g16 min fp16", "quantize_embedding": True}, {"quantize_head": True, "quantize_embedding": True},
])  # fmt: skip
def test_options_of_formats_give_what_the_graph_gives(options: dict[str, Any], tmp_path: Path) -> None:
    written = compiled("cpu-int4-kv4" if "cache_keys" in options else "cpu-int4", **options).export_onnx(tmp_path / "m.onnx")
    assert written.error is not None
    assert written.error <= CLOSE


def test_sliding_windows_and_heads_are_those_of_the_graph(tmp_path: Path) -> None:
    """Windows of 5 tokens, soft caps, norms of queries and keys: longer than the window, in both profiles."""
    for family in ("gemma2", "gemma3"):
        model = compiled("cpu-fp32", family)
        ids = torch.randint(3, 100, (1, 13), generator=torch.Generator().manual_seed(5))
        expected = model(ids)["logits"].double()
        for profile in ("portable", "ort"):
            run = session(str(model.export_onnx(tmp_path / f"{family}-{profile}.onnx", profile=profile).path))
            found, past = step(run, ids[:, :6], torch.ones(1, 6, dtype=torch.long), empty_past(run, 1))
            assert (found - expected[:, :6]).abs().max() <= CLOSE * expected.abs().max()
            for end in range(7, 14):
                found, past = step(run, ids[:, end - 1 : end], torch.ones(1, end, dtype=torch.long), past)
                assert (found[:, 0] - expected[:, end - 1]).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("profile", ["portable", "ort"])
def test_padding_on_the_right_is_nobodys_past(int4: CompiledModel, profile: str, tmp_path: Path) -> None:
    run = session(str(int4.export_onnx(tmp_path / "m.onnx", profile=profile).path))
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    _, past = step(run, ids, mask, empty_past(run, 2))
    found, _ = step(run, torch.tensor([[11], [12]]), torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1), past)
    for row, alone in enumerate(([5, 6, 7, 8, 11], [9, 10, 12])):
        expected = int4(torch.tensor([alone]))["logits"][0, -1].double()
        assert (found[row, 0] - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize(("family", "target", "options"), [("gemma2", "cpu-int4", {}), ("llama", "cpu-w8a8", {"quantize_head": True})])
def test_logits_of_the_last_tokens_are_those_of_all(family: str, target: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A soft cap behind the head; a head of integers, whose codes and scales are cut. Who does not know the input never sees it."""
    model = compiled(target, family, **options)
    path = export(model.graph, tmp_path / "m.onnx", Assets(), logits_to_keep=True, opset=23).path
    run, ids = session(str(path)), torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(5))
    every, past = step(run, ids, torch.ones_like(ids), empty_past(run, 2))
    assert every.shape == (2, 7, 100)
    counts = {count: onnxruntime.OrtValue.ortvalue_from_numpy(np.array([count])) for count in (0, 1, 3, 9)}
    for count, value in counts.items():
        given = empty_past(run, 2) | {"logits_to_keep": value}
        some, after = step(run, ids, torch.ones_like(ids), given)
        assert (some - every[:, -count:]).abs().max() <= 1e-6 * every.abs().max()
        assert all((after[name].numpy() == value.numpy()).all() for name, value in past.items())
    again = qcompile.compile(path, "cpu-fp32", max_context=64, max_batch=2, engine="torch_cpu")
    assert again.is_causal_lm
    assert (again(ids)["logits"] - every).abs().max() <= CLOSE * every.abs().max()


def test_logits_that_depend_on_other_tokens_are_not_cut(int4: CompiledModel) -> None:
    graph = int4.graph.clone()
    results = graph.output.args[0]
    assert head_of(graph) is results[0]
    with graph.fx.inserting_before(graph.output):
        total = graph.fx.call_function(torch.ops.aten.sum.dim_IntList, (results[0], [1], True))
        total.meta["val"] = results[0].meta["val"].sum(1, keepdim=True)
        shifted = graph.fx.call_function(torch.ops.aten.sub.Tensor, (results[0], total))
    shifted.meta["val"] = results[0].meta["val"]
    graph.output.args = ((shifted, *results[1:]),)
    assert head_of(graph) is None


@pytest.mark.parametrize(("family", "target"), [("bert", "cpu-int8"), ("vit", "cpu-w8a8"), ("resnet", "cpu-w8a8"), ("resnet", "cpu-fp32")])
def test_modules_without_a_cache(family: str, target: str, tmp_path: Path) -> None:
    inputs = example_inputs(family)
    model = qcompile.compile(tiny(family), target, example_inputs=inputs, calibration=[inputs], engine="torch_cpu")
    written = model.export_onnx(tmp_path / "m.onnx")
    assert written.error is not None
    assert written.error <= CLOSE
    run = session(str(written.path))
    larger = example_inputs(family, batch=3, size=9, seed=4)
    found = run.run(None, {name: tensor.numpy() for name, tensor in larger.items()})
    expected = model(**larger)
    for output, array in zip(run.get_outputs(), found, strict=True):
        assert (torch.from_numpy(array) - expected[output.name]).abs().max() <= CLOSE * expected[output.name].abs().max()


class Elementwise(nn.Module):
    """Operators that no family of models has."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low, high = x.chunk(2, dim=-1)
        places = torch.tensor([0, 2, 1])
        return {
            "division": (x * 10).round().long() // 3 + (x * 10).long() % 4,
            "activations": nn.functional.elu(x) + nn.functional.hardswish(x) + nn.functional.leaky_relu(x) + nn.functional.mish(x),
            "bounds": torch.clamp(x, -0.5) + torch.maximum(x, x.flip(0)) - x.amin(1, keepdim=True),
            "choice": torch.where(x > 0, x.exp(), x.expm1()).masked_fill(x.abs() < 0.1, 7.0),
            "parts": torch.stack([low.cumsum(1), high.tril()]),
            "taken": x[:, places] + x.index_select(1, places).repeat_interleave(2, 2)[..., ::2],
            "spread": x.var(-1) + torch.logsumexp(x, -1),
            "found": x.argmax(-1),
            "padded": nn.functional.pad(x, (1, 2), value=3.0).repeat(1, 2, 1),
            "norm": nn.functional.group_norm(x, 3) + nn.functional.layer_norm(x, (6,)),
        }


def test_other_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6)
    model = qcompile.compile(Elementwise(), "cpu-fp32", example_inputs=x, engine="torch_cpu")
    written = model.export_onnx(tmp_path / "m.onnx", opset=21)
    run = session(str(written.path))
    found = dict(zip((output.name for output in run.get_outputs()), run.run(None, {"x": x.numpy()}), strict=True))
    for name, expected in Elementwise()(x).items():
        assert torch.allclose(torch.from_numpy(found[name]).double(), expected.double(), atol=1e-5), name


class Rotations(nn.Module):
    """Of runs of channels: a matrix of its own, Sylvester's in one and in two factors, and both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))[0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rotate = torch.ops.qcompile.hadamard
        made = {"plain": rotate(x, None, 8), "long": rotate(x, None, 2048)}
        return {**made, "own": rotate(x, self.mixing, 12), "both": rotate(x, self.mixing, 12 * 512), "runs": rotate(x, self.mixing, 24)}


def test_rotations_are_those_of_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6144)
    written = qcompile.compile(Rotations(), "cpu-fp32", example_inputs=x, engine="torch_cpu").export_onnx(tmp_path / "m.onnx")
    assert written.error is not None
    assert written.error <= 1e-5


def test_external_data_holds_the_same_model(int4: CompiledModel, tmp_path: Path) -> None:
    one, two = int4.export_onnx(tmp_path / "one.onnx"), int4.export_onnx(tmp_path / "two", external_data=True)
    assert [file.name for file in two.files] == ["model.onnx", "model.onnx.data"]
    assert [file.name for file in sorted(tmp_path.rglob("*.onnx*"))] == ["one.onnx", "model.onnx", "model.onnx.data"]
    left, right = onnx.load(one.path), onnx.load(two.path)
    arrays = [{item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer} for model in (left, right)]
    assert arrays[0].keys() == arrays[1].keys()
    assert all((arrays[0][name] == arrays[1][name]).all() for name in arrays[0])
    assert one.path.read_bytes() == int4.export_onnx(tmp_path / "again.onnx").path.read_bytes()


def test_no_more_than_a_constant_stands_in_memory(int4: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    original = Constant.materialize

    def counted(self: Constant) -> Tensor:
        nonlocal most
        made = original(self).clone()
        alive.append(weakref.ref(made))
        most = max(most, sum(item() is not None for item in alive))
        return made

    monkeypatch.setattr(check, "compare", lambda *_: pytest.fail("nobody asked for a comparison"))
    monkeypatch.setattr(Constant, "materialize", counted)
    written = int4.export_onnx(tmp_path / "m", external_data=True, compare=False)
    assert (written.error, written.not_run) == (None, "not asked for")
    assert len(alive) > 20
    assert most <= 2


def test_genai_folder_describes_the_model(int4: CompiledModel, tmp_path: Path) -> None:
    assets = Assets(files={"tokenizer.json": b"{}"}, eos_token_ids=(2,), vocab_size=100, model_type="llama")
    export(int4.graph, tmp_path / "m", assets, genai=True, profile="ort")
    config = json.loads((tmp_path / "m" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    sizes = {name: decoder[name] for name in ("head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")}
    assert sizes == {"head_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    names = {given.name for given in session(str(tmp_path / "m" / "model.onnx")).get_inputs()}
    assert {decoder["inputs"]["past_key_names"] % 1, decoder["inputs"]["past_value_names"] % 0} <= names
    assert (tmp_path / "m" / "tokenizer.json").exists()


@pytest.mark.parametrize(("target", "options", "message"), [
    ("cpu-fp32-kv4", {"cache_window": 0, "cache_sinks": 0}, r"recent_keys_0: expected a cache that stores every token as it comes"),
    ("cpu-fp32-kv-qjl", {"cache_window": 0, "cache_sinks": 0}, r"keys_0: expected keys and values as numbers, or per token .*got qjl256"),
    ("cpu-fp32-kv4-xquant", {}, r"expected a cache that stores every token as it comes"),
])  # fmt: skip
def test_caches_that_onnx_does_not_express_are_named(target: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        compiled(target, **options).export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [
    ({"profile": "fast"}, "profile 'fast': expected one of portable, ort"),
    ({"opset": 18}, "opset 18: expected 21 to 25; leave it out"),
    ({"accuracy_level": 3}, "accuracy_level 3: expected 0"),
    ({"genai": True}, "expected a directory for genai=True, got a file"),
])  # fmt: skip
def test_options_that_make_no_sense_say_so(int4: CompiledModel, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        int4.export_onnx(tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_path_is_left_alone_unless_asked(int4: CompiledModel, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"m.onnx: expected a path that does not exist; choose another, or overwrite it"):
        int4.export_onnx(path)
    assert path.read_bytes() == b"mine"
    int4.export_onnx(path, overwrite=True)
    assert onnx.load(path).producer_name == "qcompile"


def test_a_file_that_computes_something_else_is_not_left_behind(
    int4: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_reference", lambda _, ids, __: torch.randn(*ids.shape, 100, dtype=torch.float64))
    with pytest.raises(
        ExportError, match=r"expected results within 0.001 of the graph's, relative to the largest, got .* from onnxruntime"
    ):
        int4.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("added", ["insert-low-rank-branch{rank=4}", "split-outliers", "reorder-channels,rotate-hadamard{online=keys}"])
def test_what_passes_make_of_a_graph_is_exported(added: str, tmp_path: Path) -> None:
    """Low-rank branches, weights in two parts, reordered channels and rotated keys of a packed cache."""
    pipeline = qcompile.compile(tiny("llama"), "cpu-int4-kv8", recipe="nearest", max_context=32, engine="torch_cpu").contents.pipeline
    passes = pipeline.replace("rewrite-kv-cache", f"{added},rewrite-kv-cache", 1)
    written = compiled("cpu-int4-kv8", passes=passes).export_onnx(tmp_path / "m.onnx")
    assert written.error is not None
    assert written.error <= CLOSE


def test_genai_decodes_as_we_do(int4: CompiledModel, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    assets = Assets(files={"tokenizer.json": b"{}"}, eos_token_ids=(2,), vocab_size=100, model_type="llama")
    export(int4.graph, tmp_path / "m", assets, genai=True, profile="ort")
    model = genai.Model(str(tmp_path / "m"))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=12, min_length=12, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens([5, 6, 7])
    for _ in range(9):
        generator.generate_next_token()
    expected = int4.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, ignore_eos=True)[0]
    assert [int(token) for token in generator.get_sequence(0)][3:] == expected
