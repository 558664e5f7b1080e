"""Nodes know the traced operators that they descend from, constants what was done to them, also after saving."""

from pathlib import Path

import pytest
import torch
from torch import fx

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.ir.branches import TakeColumns
from qcompile.ir.constants import tensor_constant
from qcompile.ir.provenance import origins
from tests.models import tiny


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return qcompile.compile(tiny("llama"), "cpu-int4", recipe="nearest", max_context=64, engine="torch_cpu")


def _called(compiled: CompiledModel, operator: object) -> list[fx.Node]:
    return compiled.graph.calls(operator)


def test_a_fused_norm_descends_from_every_operator_that_it_replaced(compiled: CompiledModel) -> None:
    norm = _called(compiled, torch.ops.qcompile.rms_norm.default)[0]
    names = [origin.split()[1] for origin in origins(norm)]
    assert {"aten.pow.Tensor_Scalar", "aten.mean.dim", "aten.rsqrt"} <= set(names)
    assert all("layers.0.input_layernorm" in origin or "embed" in origin for origin in origins(norm))


def test_both_sides_of_a_fused_sum_and_norm_are_in_it(compiled: CompiledModel) -> None:
    fused = _called(compiled, torch.ops.qcompile.add_rms_norm.default)[0]
    text = " ".join(origins(fused))
    assert "aten.add.Tensor" in text
    assert "aten.rsqrt" in text


def test_attention_descends_from_its_own_layer(compiled: CompiledModel) -> None:
    for index, node in enumerate(_called(compiled, torch.ops.qcompile.cache_attend.default)):
        assert any(f"layers.{index}.self_attn" in origin for origin in origins(node))
        assert not any(f"layers.{index + 1}." in origin for origin in origins(node))


def test_constants_know_what_was_done_to_them_after_loading_too(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "out")
    loaded = qcompile.load(tmp_path / "out")
    name = next(name for name in compiled.graph.constants if name.endswith("down_proj.weight.codes"))
    assert any(line.startswith("quantize(int4 g") and line.endswith(".codes") for line in compiled.graph.constants[name].log)
    for key, constant in compiled.graph.constants.items():
        assert loaded.graph.constants[key].log == constant.log
    mine, theirs = ({node.name: origins(node) for node in graph.nodes} for graph in (compiled.graph, loaded.graph))
    assert mine == theirs


def test_a_log_holds_no_addresses() -> None:
    """Keys tell large tensors apart by where they lie; a listing is the same in every process."""
    first, second = (tensor_constant(torch.ones(2, 8)).then(TakeColumns(tensor_constant(torch.arange(5000)))) for _ in range(2))
    assert first.log == second.log == ("take-columns(memory:int64[5000])",)
    assert first.key != second.key
