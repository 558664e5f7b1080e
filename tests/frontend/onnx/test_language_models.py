"""Language models in ONNX: a past is cut off and the compiler's cache takes its place, or it is said why not."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")

import qcompile
from benchmarks.onnx_peers import WithCache
from qcompile.errors import SourceError, UnsupportedModelError
from qcompile.frontend import capture_module, load
from qcompile.frontend.onnx.causal import finish
from qcompile.ir.graph import Graph, operator_name
from tests.frontend.onnx.making import FLOAT, INT64, imported, make, node, random, saved, stock
from tests.models import VOCABULARY, tiny

LAYERS = 1
attend = torch.ops.qcompile.attention.default
TEXT = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


# As torch.onnx writes them


def written(path: Path, attention: str, opset: int) -> Path:
    """A tiny llama with a past, by `torch.onnx`."""
    pytest.importorskip("onnxscript")
    model: Any = tiny("llama", num_hidden_layers=LAYERS)
    model.set_attn_implementation(attention)
    kinds = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    batch, sequence, before = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "sequence", "past_sequence"))
    shapes = {
        "input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: torch.export.Dim.DYNAMIC},
        "past": [{0: batch, 2: before} for _ in kinds],
    }  # fmt: skip
    inputs = {
        "input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "past": [torch.zeros(2, 2, 3, 8) for _ in kinds],
    }  # fmt: skip
    torch.onnx.export(
        WithCache(model), (), str(path), dynamo=True, external_data=False, opset_version=opset, verbose=False, kwargs=inputs,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{kind}" for kind in kinds)],
        output_names=["logits", *(f"present.{kind}" for kind in kinds)], dynamic_shapes=shapes,
    )  # fmt: skip
    return path


@pytest.mark.parametrize(("attention", "opset"), [("eager", 18), ("sdpa", 21), ("sdpa", 23)])
def test_exports_of_torch_get_the_compilers_own_cache(attention: str, opset: int, tmp_path: Path) -> None:
    path, model = written(tmp_path / "m.onnx", attention, opset), tiny("llama", num_hidden_layers=LAYERS)
    compiled = qcompile.compile(path, "cpu-fp32", max_context=64, max_batch=2, engine="torch_cpu")
    with torch.no_grad():
        expected = model(TEXT).logits
        greedy = model.generate(
            TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert (compiled(TEXT)["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert compiled.generate([row.tolist() for row in TEXT], max_new_tokens=6, ignore_eos=True) == greedy[:, 9:].tolist()
    # Every pattern that passes look for is there, as often as in the graph of the module itself.
    called = Counter(operator_name(item.target) for item in compiled.graph.nodes if item.op == "call_function")
    found = {name: called[name] for name in ("rotary_table", "rope", "cache_attend", "gated_activation", "aten.linear", "attention")}
    assert found == {"rotary_table": 1, "rope": 2, "cache_attend": 1, "gated_activation": 1, "aten.linear": 8, "attention": 0}
    assert called["rms_norm"] + called["add_rms_norm"] == 3
    assert not {"aten.cos", "aten.softmax.int", "aten.cat", "aten.where.Scalar"} & set(called)


# What is proved


class Small(nn.Module):
    """One layer of attention in the words of a test: a mask, positions, and whatever stands behind."""

    def __init__(self, mask: Callable[[Tensor], Tensor | None], positions: Callable[..., Tensor], behind: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mask, self.positions, self.behind = mask, positions, behind
        self.tokens, self.places, self.head = nn.Embedding(20, 8), nn.Embedding(64, 8), nn.Linear(8, 20)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(self.positions(input_ids, attention_mask, position_ids))
        heads = x.reshape(*x.shape[:2], 2, 4).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / 2.0
        bias = self.mask(attention_mask)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return self.head(self.behind((weights @ heads).transpose(1, 2).flatten(2), attention_mask))


def bias_of(keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, -3e38)


def past(mask: Tensor, window: int = 0, padded: bool = True) -> Tensor:
    row, column = torch.arange(mask.shape[1])[:, None], torch.arange(mask.shape[1])
    keep = column <= row if not window else (column <= row) & (column > row - window)
    return keep & (mask != 0)[:, None, None, :] if padded else keep


def counted(mask: Tensor) -> Tensor:
    return mask.cumsum(-1) - 1


def given(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    del ids, mask
    return positions


def same(x: Tensor, mask: Tensor) -> Tensor:
    del mask
    return x


def captured(mask: Any, positions: Any = given, behind: Any = same) -> tuple[Graph, Small]:
    module = Small(mask, positions, behind)
    ids = torch.arange(16).view(2, 8)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=64)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8).repeat(2, 1)}
    return capture_module(module, inputs, dict.fromkeys(inputs, sizes)), module


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (lambda mask: bias_of(past(mask)), 0),
        (lambda mask: bias_of(past(mask, padded=False)), 0),
        (lambda mask: bias_of(past(mask, window=3)), 3),
        (lambda mask: bias_of(past(mask, window=40, padded=False)), 40),
        (lambda mask: torch.full((mask.shape[1], mask.shape[1]), -torch.inf).triu(1), 0),
        (lambda mask: bias_of(past(mask) & (counted(mask)[:, None, None, :] > counted(mask)[:, None, :, None] - 3)), 3),
    ],
)
def test_masks_are_what_they_are_computed_to_be(mask: Any, window: int) -> None:
    graph, module = captured(mask)
    assert finish(graph, 0) == ""
    assert graph.interface.kind == "causal_lm"
    (attention,) = graph.calls(attend)
    assert attention.args[3] is graph.placeholders[1]
    assert attention.args[4:8] == (None, 0.5, True, window)
    ids = torch.arange(45).view(1, 45) % 20
    inputs = (ids, torch.ones_like(ids), torch.arange(45).view(1, 45))
    found = graph(**dict(zip(("input_ids", "attention_mask", "position_ids"), inputs, strict=True)))["logits"]
    torch.testing.assert_close(found, module(*inputs))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda _: None, r"expected causal attention, got Visibility\(causal=False, window=0, padded=False\)"),
        (lambda mask: bias_of((mask != 0)[:, None, None, :]), "expected causal attention, got Visibility"),
        (lambda mask: bias_of(past(mask) | (torch.arange(mask.shape[1]) < 4)), "none of those known"),
        (lambda mask: bias_of(past(mask) & (torch.arange(mask.shape[1]) % 2 == 0)), "none of those known"),
        (lambda mask: bias_of(past(mask)) - 0.5 * torch.arange(mask.shape[1]), "none of those known"),
        (lambda mask: bias_of(past(mask, window=9000)), "none of those known"),
    ],
)
def test_an_unknown_mask_is_left_alone(mask: Any, reason: str) -> None:
    graph, _ = captured(mask)
    found = finish(graph, 0)
    assert reason.replace("\\", "") in found
    assert graph.interface.kind == "module"


@pytest.mark.parametrize(
    "positions",
    [
        lambda ids, mask, _: mask.cumsum(-1) - 1,
        lambda ids, mask, _: ((mask.cumsum(-1) * mask) - 1).clamp(min=0),
        lambda ids, mask, _: torch.arange(ids.shape[1]).unsqueeze(0),
        lambda ids, mask, _: torch.arange(ids.shape[1]).expand(ids.shape[0], -1) + 2 - 2,
    ],
)
def test_positions_become_an_input(positions: Any) -> None:
    graph, module = captured(lambda mask: bias_of(past(mask)), positions)
    assert finish(graph, 0) == ""
    ids = torch.arange(9).view(1, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).view(1, 9)}
    torch.testing.assert_close(graph(**inputs)["logits"], module(**inputs))
    moved = graph(**inputs | {"position_ids": inputs["position_ids"] + 1})["logits"]
    assert not torch.allclose(moved, graph(**inputs)["logits"])


@pytest.mark.parametrize(
    ("positions", "behind", "reason"),
    [
        (lambda ids, mask, _: (ids.shape[1] - 1 - torch.arange(ids.shape[1])).unsqueeze(0), same, "positions to come from position_ids"),
        (given, lambda x, mask: x * mask[..., None], "expected attention_mask to be read by attention alone"),
        (given, lambda x, _: x + x.mean(1, keepdim=True), "tokens to see each other in attention alone"),
        (given, lambda x, _: x.cumsum(1), "tokens to see each other in attention alone"),
        (given, lambda x, _: x + torch.arange(x.shape[1])[:, None], "positions to come from position_ids"),
    ],
)
def test_a_model_that_a_cache_would_change_stays_a_module(positions: Any, behind: Any, reason: str) -> None:
    graph, _ = captured(lambda mask: bias_of(past(mask)), positions, behind)
    assert reason in finish(graph, 0)
    assert graph.interface.kind == "module"


# onnxruntime's own operators, and what lies beside a file


def test_grouped_queries_with_positions_inside_are_those_of_onnxruntime(tmp_path: Path) -> None:
    angles = np.outer(np.arange(16), 1 / 100 ** (np.arange(8) / 8)).astype(np.float32)
    inputs = {name: (["batch", "sequence", size], FLOAT) for name, size in (("q", 64), ("k", 32), ("v", 32))}
    operator = node(
        "GroupQueryAttention", "q k v - - last total cos sin", "y present_k present_v", domain="com.microsoft", num_heads=4,
        kv_num_heads=2, do_rotary=1, local_window_size=4, softcap=3.0,
    )  # fmt: skip
    weights = {"cos": np.cos(angles), "sin": np.sin(angles), "last": np.array([6, 6], np.int32), "total": np.array(7, np.int32)}
    path = saved(make([operator], inputs, "y present_k", weights), tmp_path)
    given_inputs = {name: torch.from_numpy(random(2, 7, shape[2], seed=index)) for index, (name, (shape, _)) in enumerate(inputs.items())}
    for found, expected in zip(imported(path, given_inputs), stock(path, given_inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"unidirectional": 1, "scale": 0.3}])
def test_many_heads_are_those_of_onnxruntime(options: dict[str, Any], tmp_path: Path) -> None:
    inputs = {name: (["batch", "sequence", 12], FLOAT) for name in ("q", "k", "v")}
    inputs["mask"] = (["batch", "sequence"], 6)
    operator = node("MultiHeadAttention", "q k v b mask", "y", domain="com.microsoft", num_heads=3, **options)
    path = saved(make([operator], inputs, "y", {"b": random(36)}), tmp_path)
    mask = torch.ones(2, 5, dtype=torch.int32)
    mask[1, 3:] = 0
    given_inputs = {name: torch.from_numpy(random(2, 5, 12, seed=index)) for index, name in enumerate("qkv")} | {"mask": mask}
    (found,), (expected,) = imported(path, given_inputs), stock(path, given_inputs)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        ("q k v p p last total", {}, "got one that other inputs come with"),
        ("q k v - - last total", {"smooth_softmax": 1}, "expected a plain softmax"),
        ("q k v - - last total", {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}, "got a cache of integers"),
    ],
)
def test_grouped_queries_that_mean_more_are_refused_by_node(inputs: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    shapes = {name: (["batch", "sequence", 16], FLOAT) for name in ("q", "k", "v")} | {"p": (["batch", 2, "before", 8], FLOAT)}
    operator = node("GroupQueryAttention", inputs, "y", domain="com.microsoft", num_heads=2, kv_num_heads=2, **options)
    last = {"last": np.array([6, 6], np.int32), "total": np.array(7, np.int32)}
    path = saved(make([operator, node("Identity", "p", "z")], shapes, "y z", last), tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"node 'y_node'.*{reason}"):
        load(path)


def language(folder: Path, present: str = "present.0.key") -> Path:
    """Names of a language model around no attention at all."""
    inputs = {
        "input_ids": (["batch", "sequence"], INT64), "attention_mask": (["batch", "total"], INT64),
        "past_key_values.0.key": (["batch", 2, "past", 4], FLOAT), "past_key_values.0.value": (["batch", 2, "past", 4], FLOAT),
    }  # fmt: skip
    nodes = [
        node("Gather", "table input_ids", "x"), node("Identity", "x", "logits"),
        node("Identity", "past_key_values.0.key", present), node("Cast", "attention_mask", "unused", to=1),
    ]  # fmt: skip
    return saved(make(nodes, inputs, f"logits {present}", {"table": random(20, 6)}), folder)


def test_what_only_has_the_names_is_a_module_and_says_why(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="compiled as a plain module.*expected one attention for each of 1 layers, got 0"):
        loaded = load(language(tmp_path))
    assert loaded.graph.interface.kind == "module"
    assert [placeholder.name for placeholder in loaded.graph.placeholders][2:] == ["past_key_values_0_key", "past_key_values_0_value"]


def test_other_outputs_are_not_dropped(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(language(tmp_path, "hidden"))
    assert set(loaded.graph.interface.outputs["dict"]) == {"logits", "hidden"}  # type: ignore[index]


def test_a_tokenizer_beside_the_file_comes_along(tmp_path: Path) -> None:
    compiled = qcompile.compile(tiny("llama"), "cpu-fp32", max_context=64, engine="torch_cpu")
    (tmp_path / "onnx").mkdir()
    path = compiled.export_onnx(tmp_path / "onnx" / "m.onnx").path
    tokenizer = {"added_tokens": [{"id": 7, "content": "<end>"}], "model": {"vocab": {}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": "{{ messages }}"}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_position_embeddings": 128, "model_type": "llama"}))
    assets = load(path).assets
    assert set(assets.files) == {"tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"}
    assert (assets.eos_token_ids, assets.max_positions, assets.vocab_size, assets.model_type) == ((2, 7), 128, VOCABULARY, "llama")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json: expected JSON"):
        load(path)
