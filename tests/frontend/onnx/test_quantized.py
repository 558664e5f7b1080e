"""Nodes of quantized files keep what they hold: packed weights, formats, codes of activations, the numbers that onnxruntime computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import ModelProto, TensorProto, helper

import qcompile
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.passes.convert_dtype import convert
from qcompile.passes.selection import find_sites
from qcompile.quant.reference import dequantize
from tests.frontend.onnx.making import FLOAT, INT64, make, node, random, same, saved, stock
from tests.passes.helpers import context

INT4, UINT4, INT8, UINT8 = TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8
LEAST = {INT4: -8, UINT4: 0, INT8: -128, UINT8: 0}
BITS = {INT4: 4, UINT4: 4, INT8: 8, UINT8: 8}
ops, aten = torch.ops.qcompile, torch.ops.aten


def codes(kind: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    low, bits = LEAST[kind], BITS[kind]
    return np.random.default_rng(seed).integers(low, low + (1 << bits), shape)


def tensor(name: str, kind: int, values: np.ndarray[Any, Any]) -> TensorProto:
    return helper.make_tensor(name, kind, list(values.shape), values.reshape(-1).tolist())


def scales(*shape: int, seed: int = 9) -> np.ndarray[Any, Any]:
    return (np.abs(random(*shape, seed=seed)) + 0.01).astype(np.float32)


def packed_values(graph: Graph) -> Tensor:
    """The one packed weight of a graph as its reference makes it, [N, K]."""
    parts = {name.rpartition(".")[2]: constant for name, constant in graph.constants.items() if constant.format is not None}
    form = next(iter(parts.values())).format
    (call,) = [item for item in graph.nodes if item.target in (ops.dequantize.default, ops.integer_linear.default)]
    columns = int(call.args[5]) if call.target is ops.dequantize.default else int(graph.placeholders[0].meta["val"].shape[-1])
    zero = parts["zero"].materialize() if "zero" in parts else None
    size = form.granularity.group_size
    return dequantize(parts["codes"].materialize(), parts["scale"].materialize(), zero, form.element.bits, size, columns, torch.float32)


K, N = 40, 24


def product(kind: int, zero: bool, layout: str, block: int) -> tuple[ModelProto, np.ndarray[Any, Any]]:
    """X times a quantized weight plus a bias, stored as `layout` says; and the weight [N, K] in float32."""
    stored_as = (K, N) if layout == "matmul" else (N, K)
    along = 0 if layout == "matmul" else 1
    groups = -(-K // block) if block else 1
    part = () if block < 0 else (N,) if not block else (groups, N) if layout == "matmul" else (N, groups)
    options = {"axis": along, "block_size": block} if block > 0 else {"axis": 1 - along}
    values, scale, offset = codes(kind, *stored_as), scales(*part), codes(kind, *part, seed=1)
    weights = {"w": tensor("w", kind, values), "s": np.asarray(scale), "b": random(N)}
    weights |= {"z": tensor("z", kind, np.asarray(offset))} if zero else {}
    nodes = [node("DequantizeLinear", "w s z" if zero else "w s", "d", **options)]
    if layout == "gemm":
        nodes += [node("Gemm", "x d b", "y", transB=1)]
    else:
        nodes += [node("Transpose", "d", "t", perm=[1, 0])] if layout == "transpose" else []
        nodes += [node("MatMul", "x t" if layout == "transpose" else "x d", "p"), node("Add", "p b", "y")]

    def spread(of: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if block > 0:
            return np.take(np.repeat(of, block, along), range(K), along)
        return of if block < 0 else np.expand_dims(of, along)

    shifted = values - spread(np.asarray(offset)) if zero else values
    exact = shifted.astype(np.float32) * spread(np.asarray(scale))
    return make(nodes, {"x": (["B", K], FLOAT)}, "y", weights, opset=21), exact.T if layout == "matmul" else exact


@pytest.mark.parametrize(("kind", "zero", "layout", "block", "form"), [
    (INT4, False, "matmul", 16, "int4 g16 sym fp32"), (UINT4, True, "matmul", 16, "int4 g16 asym fp32"),
    (INT8, False, "gemm", 0, "int8 channel sym fp32"), (UINT8, True, "transpose", 0, "int8 channel asym fp32"),
    (INT8, True, "gemm", 32, "int8 g32 asym fp32"), (UINT4, False, "transpose", 16, "int4 g16 asym fp32"),
    (INT8, False, "matmul", -1, "int8 channel sym fp32"), (INT4, True, "transpose", 64, "int4 channel asym fp32"),
])  # fmt: skip
def test_weights_of_products(kind: int, zero: bool, layout: str, block: int, form: str, tmp_path: Path) -> None:
    model, exact = product(kind, zero, layout, block)
    path, x = saved(model, tmp_path), {"x": torch.from_numpy(random(5, K, seed=3))}
    graph = load(path).graph
    assert {str(constant.format) for constant in graph.constants.values() if constant.format} == {form}
    assert torch.equal(packed_values(graph), torch.from_numpy(np.ascontiguousarray(exact)))
    assert graph.constants["w.codes"].nbytes == N * K * BITS[kind] // 8
    assert same(graph(**x), stock(path, x)[0])
    (linear,) = graph.calls(aten.linear.default)
    assert len(linear.args) == 3, "the bias is the linear's"


def test_filters_and_tables(tmp_path: Path) -> None:
    """A convolution, a depthwise one with one scale, filters stored as a matrix, and a lookup."""
    weights = {
        "w": tensor("w", INT8, codes(INT8, 6, 3, 3, 3)), "s": scales(6), "v": tensor("v", UINT8, codes(UINT8, 6, 1, 3, 3)),
        "t": scales(), "z": tensor("z", UINT8, np.array(128)), "m": tensor("m", INT8, codes(INT8, 4, 6)), "o": np.array([-1, 6, 1, 1]),
    }  # fmt: skip
    nodes = [
        node("DequantizeLinear", "w s", "wd", axis=0), node("Conv", "x wd", "a", pads=[1, 1, 1, 1]),
        node("DequantizeLinear", "v t z", "vd"), node("Conv", "a vd", "b", group=6), node("DequantizeLinear", "m t", "md"),
        node("Reshape", "md o", "mr"), node("Conv", "b mr", "y"),
    ]  # fmt: skip
    path = saved(make(nodes, {"x": (["B", 3, 8, 8], FLOAT)}, "y", weights, opset=21), tmp_path)
    x, graph = {"x": torch.from_numpy(random(2, 3, 8, 8))}, load(path).graph
    assert same(graph(**x), stock(path, x)[0])
    formats = [str(graph.constants[f"{name}.codes"].format) for name in "wvm"]
    assert formats == ["int8 channel sym fp32"] * 3, "128 is the middle of what has no sign"
    table = {"e": tensor("e", INT4, codes(INT4, 50, 32)), "s": scales(50, 2)}
    nodes = [node("DequantizeLinear", "e s", "d", axis=1, block_size=16), node("Gather", "d i", "y")]
    path = saved(make(nodes, {"i": (["B", "S"], INT64)}, "y", table, opset=21), tmp_path)
    ids = {"i": torch.randint(0, 50, (2, 7))}
    compiled = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    compiled.save(tmp_path / "saved")
    assert torch.equal(qcompile.load(tmp_path / "saved")(**ids), stock(path, ids)[0])
    assert [(row.operator, row.format) for row in compiled.coverage] == [("quantized_embedding", "int4 g16 sym fp32")]


@pytest.mark.parametrize(("bits", "zero", "columns"), [(4, False, 64), (4, True, 72), (8, False, 64), (8, True, 72), (2, True, 64)])
def test_blocks_of_onnxruntime(bits: int, zero: bool, columns: int, tmp_path: Path) -> None:
    blocks, rng = -(-columns // 32), np.random.default_rng(0)
    weights = {"q": rng.integers(0, 256, (N, blocks, 32 * bits // 8), np.uint8), "s": scales(N, blocks), "b": random(N)}
    weights |= {"z": rng.integers(0, 256, (N, -(-blocks * bits // 8)), np.uint8)} if zero else {}
    options = {"K": columns, "N": N, "bits": bits, "block_size": 32, "accuracy_level": 1}
    nodes = [node("MatMulNBits", "x q s z - b" if zero else "x q s - - b", "y", domain="com.microsoft", **options)]
    path = saved(make(nodes, {"x": (["B", "S", columns], FLOAT)}, "y", weights), tmp_path)
    x = {"x": torch.from_numpy(random(2, 3, columns))}
    compiled = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    assert [row.format for row in compiled.coverage] == [f"int{bits} g32 {'asym' if zero else 'sym'} fp32"]
    assert same(compiled(**x), stock(path, x)[0])
    stored = N * (columns * bits + blocks * 32 + (-(-blocks * bits // 8) * 8 if zero else 0))
    assert compiled.bits_per_weight == stored / (N * columns)


def test_what_has_no_format_stays_as_it_is_and_is_named(tmp_path: Path) -> None:
    """Blocks along the rows, an operator without a packed form, zero points between the levels."""
    weights = {"w": tensor("w", INT8, codes(INT8, K, N)), "s": scales(K, 3)}
    nodes = [node("DequantizeLinear", "w s", "d", axis=1, block_size=8), node("MatMul", "x d", "y")]
    path, x = saved(make(nodes, {"x": (["B", K], FLOAT)}, "y", weights, opset=21), tmp_path), {"x": torch.from_numpy(random(5, K))}
    with pytest.warns(UserWarning, match=r"read as floats: 'd': its blocks of 8 along axis 1 are not runs of two or more input columns"):
        graph = load(path).graph
    assert same(graph(**x), stock(path, x)[0])
    weights = {"w": tensor("w", INT8, codes(INT8, 3, 4, 2, 2)), "s": scales()}
    nodes = [node("DequantizeLinear", "w s", "d"), node("ConvTranspose", "x d", "y")]
    path, x = saved(make(nodes, {"x": (["B", 3, 4, 4], FLOAT)}, "y", weights), tmp_path), {"x": torch.from_numpy(random(2, 3, 4, 4))}
    with pytest.warns(UserWarning, match="'d': ConvTranspose reads its numbers"):
        graph = load(path).graph
    assert same(graph(**x), stock(path, x)[0])
    parts = {"q": np.random.default_rng(0).integers(0, 256, (N, 2, 16), np.uint8), "s": scales(N, 2), "z": scales(N, 2) * 10}
    nodes = [node("MatMulNBits", "x q s z", "y", domain="com.microsoft", K=64, N=N, bits=4, block_size=32, accuracy_level=1)]
    path, x = saved(make(nodes, {"x": (["B", 64], FLOAT)}, "y", parts), tmp_path), {"x": torch.from_numpy(random(5, 64))}
    with pytest.warns(UserWarning, match="'q': its zero points lie between the levels"):
        graph = load(path).graph
    assert same(graph(**x), stock(path, x)[0])


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8", "cpu-w8a8"])
def test_pipelines_leave_such_weights_alone(target: str, tmp_path: Path) -> None:
    compiled = qcompile.compile(
        saved(product(UINT4, True, "matmul", 16)[0], tmp_path), target, recipe="best", strict=True, engine="torch_cpu"
    )
    (row,) = [row for row in compiled.coverage if "linear" in row.operator]
    assert row.format == "int4 g16 asym fp32"
    assert compiled.weight_bytes == N * (K // 2 + 3 * 4 + 2) + N * 4
    ctx = context(target)
    find_sites(load(tmp_path / "model.onnx").graph, ctx, "quantize-weights")
    assert [note[2:] for note in ctx.notes] == ([] if target == "cpu-fp32" else [("its weight came quantized, and stays as it came", True)])


def test_scales_stay_what_they_are_in_half_precision(tmp_path: Path) -> None:
    weights = {"w": tensor("w", INT8, codes(INT8, K, N)), "s": scales(N), "x_s": np.float32(0.02)}
    nodes = [
        node("QuantizeLinear", "x x_s", "q"), node("DequantizeLinear", "q x_s", "d"), node("DequantizeLinear", "w s", "wd"),
        node("MatMul", "d wd", "p"), node("Add", "p b", "y"),
    ]  # fmt: skip
    graph = load(saved(make(nodes, {"x": (["B", K], FLOAT)}, "y", weights | {"b": random(N)}, opset=21), tmp_path)).graph
    assert convert(graph, torch.bfloat16)
    assert {name: constant.dtype for name, constant in graph.constants.items()} == {
        "w.codes": torch.uint8, "w.scale": torch.float32, "b": torch.bfloat16, "x.scale": torch.float32, "x.zero": torch.int32,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [INT8, UINT8])
def test_rounded_activations_become_integer_products(kind: int, tmp_path: Path) -> None:
    """Q/DQ in front of a convolution and a product; the codes of the first are also read by a sum."""
    zero = tensor("z", kind, np.array(3 if kind == INT8 else 131))
    weights = {
        "w": tensor("w", INT8, codes(INT8, 6, 3, 3, 3)), "ws": scales(6) / 100, "s": np.float32(0.02), "z": zero, "s2": np.float32(0.3),
        "v": tensor("v", INT8, codes(INT8, 5, 6)), "vs": scales(5) / 100, "z2": tensor("z2", kind, np.array(LEAST[kind] + 128)),
        "c": tensor("c", TensorProto.INT32, np.arange(6) * 1000), "cs": (scales(6) / 100 * 0.02).astype(np.float32),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"), node("DequantizeLinear", "w ws", "wd", axis=0),
        node("DequantizeLinear", "c cs", "cd", axis=0), node("Conv", "d wd cd", "a", pads=[1, 1, 1, 1]),
        node("Relu", "a", "r"), node("GlobalAveragePool", "r", "g"), node("Flatten", "g", "f"), node("QuantizeLinear", "f s2 z2", "q2"),
        node("DequantizeLinear", "q2 s2 z2", "d2"), node("DequantizeLinear", "v vs", "vd", axis=0), node("Gemm", "d2 vd", "y", transB=1),
    ]  # fmt: skip
    path = saved(make(nodes, {"x": (["B", 3, 8, 8], FLOAT)}, "y", weights, opset=21), tmp_path)
    x = {"x": torch.from_numpy(random(4, 3, 8, 8))}
    graph, exact = load(path).graph, stock(path, x)[0]
    assert len(graph.calls(ops.quantize_static.default)) == len(graph.calls(ops.dequantize_activation.default)) == 2
    assert same(graph(**x), exact)
    compiled = qcompile.compile(path, "cpu-w8a8", engine="torch_cpu")
    made = Counter((row.operator, row.activation) for row in compiled.coverage if "integer" in row.operator)
    assert made == {("integer_conv2d", "int8 tensor asym static"): 1, ("integer_linear", "int8 tensor sym static"): 1}
    assert same(compiled(**x), exact)
    assert same(qcompile.compile(path, "cpu-fp32", engine="torch_cpu")(**x), exact)
