"""The contract with transformers: every listed family is captured whole, with one attention per layer, and computes what eager computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.frontend import Loaded, load
from qcompile.ir.graph import Graph
from tests.models import CAUSAL_FAMILIES, OTHER_FAMILIES, example_inputs, tiny

FAMILIES = CAUSAL_FAMILIES + OTHER_FAMILIES
WINDOWS = {"mistral": [5, 5], "gemma2": [5, 0], "gemma3": [5, 0]}
_ATTENTION = torch.ops.qcompile.attention.default


def _load(family: str, model: nn.Module | Path) -> Loaded:
    # A convolutional network's configuration does not say how large its images are.
    return load(model, example_inputs=example_inputs(family) if family == "resnet" else None)


def _eager(family: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = tiny(family)
    if family != "resnet":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        result = model(**inputs)
    return {"logits": result["logits"]} if family in CAUSAL_FAMILIES else dict(result)


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max() / tensor.abs().max()) <= tolerance, name


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    """One capture per family, shared by the tests of this file, which do not change it."""
    return {}


@pytest.fixture
def graph(request: pytest.FixtureRequest, graphs: dict[str, Graph]) -> Graph:
    family = request.getfixturevalue("family")
    if family not in graphs:
        graphs[family] = _load(family, tiny(family)).graph
    return graphs[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_at_another_size(family: str, graph: Graph) -> None:
    inputs = example_inputs(family, batch=3, size=11, seed=5)
    _assert_close(graph(**inputs), _eager(family, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_serves_one_sequence_of_one_token(family: str, graph: Graph) -> None:
    inputs = example_inputs(family, batch=1, size=1)
    _assert_close(graph(**inputs), _eager(family, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_and_sequence_stay_symbolic(family: str, graph: Graph) -> None:
    expected = {"batch"} if family in ("vit", "resnet") else {"batch", "sequence"}
    assert set(graph.interface.symbols.values()) == expected
    assert {str(size) for node in graph.placeholders for size in node.meta["val"].shape} >= set(graph.interface.symbols)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_attention_per_layer(family: str, graph: Graph) -> None:
    attentions = graph.calls(_ATTENTION)
    assert len(attentions) == (0 if family == "resnet" else 2)
    assert [node.args[6] for node in attentions] == [family in CAUSAL_FAMILIES] * len(attentions)
    assert [(*node.args, 0)[7] for node in attentions] == WINDOWS.get(family, [0] * len(attentions))
    padding = {node.args[3] for node in attentions}
    assert padding == (set() if family == "resnet" else {None} if family == "vit" else {graph.placeholders[1]})
    assert all("modeling_" in node.meta["source"] for node in attentions)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "falcon"])
def test_keys_and_values_are_not_repeated(family: str, graph: Graph) -> None:
    heads = {int(node.args[1].meta["val"].shape[1]) for node in graph.calls(_ATTENTION)}
    assert heads == {1 if family == "falcon" else 2}


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_causal_interface(family: str, graph: Graph) -> None:
    assert graph.interface.kind == "causal_lm"
    assert [node.name for node in graph.placeholders] == ["input_ids", "attention_mask", "position_ids"]
    assert list(graph.interface.examples) == ["input_ids", "attention_mask", "position_ids"]
    assert graph.interface.outputs == {"dict": {"logits": {"leaf": 0}}}


# bert takes positions from the place in the row, so that padding on the left is another input.
@pytest.mark.parametrize(
    ("family", "side"), [*((family, side) for family in CAUSAL_FAMILIES for side in ("left", "right")), ("bert", "right")]
)
def test_padding_changes_nothing_at_real_tokens(family: str, side: str, graph: Graph) -> None:
    name = "logits" if family in CAUSAL_FAMILIES else "last_hidden_state"
    alone = example_inputs(family, batch=1, size=6, seed=3)
    pad = {key: torch.zeros(1, 3, dtype=torch.long) for key in alone}
    row = {key: torch.cat((pad[key], value) if side == "left" else (value, pad[key]), dim=1) for key, value in alone.items()}
    other = example_inputs(family, batch=1, size=9, seed=4)
    both = {key: torch.cat((value, row[key])) for key, value in other.items()}
    if family in CAUSAL_FAMILIES:
        both["position_ids"] = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
    result = graph(**both)[name]
    assert torch.isfinite(result).all()
    real = result[1:, 3:] if side == "left" else result[1:, :6]
    _assert_close({name: real}, {name: graph(**alone)[name]})
    _assert_close({name: result[:1]}, {name: graph(**other)[name]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_directory_gives_the_same(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    loaded = _load(family, tmp_path)
    inputs = example_inputs(family, batch=3, size=9, seed=6)
    _assert_close(loaded.graph(**inputs), _eager(family, inputs))
    assert loaded.assets.model_type == tiny(family).config.model_type
    weights = [name for name, constant in loaded.graph.constants.items() if constant.nbytes > 4096]
    assert all("safetensors:" in loaded.graph.constants[name].key for name in weights)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("saved", [False, True], ids=["module", "directory"])
def test_tied_weights_are_one_constant(family: str, saved: bool, tmp_path: Path) -> None:
    model = tiny(family)
    if saved:
        model.save_pretrained(tmp_path)
    graph = _load(family, tmp_path if saved else model).graph
    vocabulary = [name for name, constant in graph.constants.items() if 100 in constant.shape]
    assert len(vocabulary) == 1
    (node,) = graph.fx.find_nodes(op="get_attr", target=vocabulary[0])
    assert len(node.users) == 2


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_one_node_for_the_experts_of_a_layer(family: str, graph: Graph) -> None:
    experts = graph.calls(torch.ops.qcompile.moe_experts.default)
    assert len(experts) == 2
    assert [int(node.args[3].meta["val"].shape[0]) for node in experts] == [4, 4]
    assert {node.args[5] for node in experts} == {"silu"}


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float16), ("gemma2", torch.bfloat16), ("mixtral", torch.bfloat16), ("bert", torch.bfloat16)]
)
def test_half_precision_is_traced_in_float32(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    graph = load(model).graph
    assert {node.meta["val"].dtype for node in graph.calls(torch.ops.aten.linear.default)} == {torch.float32}
    assert next(model.parameters()).dtype is dtype
    inputs = example_inputs(family, size=5)
    with torch.no_grad():
        expected = model.float()(**inputs)
    _assert_close(graph(**inputs), {name: expected[name] for name in graph(**inputs)})
