"""Operators of onnxruntime over quantized tensors, as it computes them: codes within one step, where a tie may round either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import NodeProto, TensorProto, helper

from tests.frontend.onnx.making import FLOAT, INT64, imported, make, random, saved, stock

UINT8, INT8, UINT4 = TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT4


def own(operator: str, inputs: str, **attributes: Any) -> NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(operator, names, ["y"], name="y_node", domain="com.microsoft", **attributes)


def drawn(kind: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    low, high, dtype = (0, 256, np.uint8) if kind == UINT8 else (-128, 128, np.int8)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def parts(kind: int) -> dict[str, Any]:
    """Scales and zero points of two operands and of a result."""
    zero = np.uint8 if kind == UINT8 else np.int8
    scales = {"as": 0.02, "bs": 0.013, "ys": 0.031}
    return {name: np.float32(value) for name, value in scales.items()} | {
        "az": zero(3),
        "bz": zero(9),
        "yz": zero(100 - 40 * (kind == INT8)),
    }


@pytest.mark.parametrize("kind", [UINT8, INT8])
@pytest.mark.parametrize(("operator", "inputs", "attributes"), [
    ("QLinearAdd", "a as az b bs bz ys yz", {}), ("QLinearMul", "a as az b bs bz ys yz", {}),
    ("QLinearSigmoid", "a as az bs bz", {}), ("QLinearLeakyRelu", "a as az ys yz", {"alpha": 0.2}),
    ("QLinearSoftmax", "a as az bs bz", {"axis": -1, "opset": 13}), ("QLinearGlobalAveragePool", "a as az bs bz", {"channels_last": 0}),
    ("QLinearAveragePool", "a as az bs bz", {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "strides": [2, 2]}),
    ("QLinearConcat", "ys yz a as az b bs bz", {"axis": 1}),
])  # fmt: skip
def test_codes(operator: str, inputs: str, attributes: dict[str, Any], kind: int, tmp_path: Path) -> None:
    shape = ["n", 3, 4, 6]
    given = {name: torch.from_numpy(drawn(kind, 2, 3, 4, 6, seed=seed)) for seed, name in enumerate("ab") if name in inputs.split()}
    weights = {name: value for name, value in parts(kind).items() if name in inputs.split()}
    path = saved(make([own(operator, inputs, **attributes)], dict.fromkeys(given, (shape, kind)), "y", weights), tmp_path)
    (found,), (expected,) = imported(path, given), stock(path, given)
    assert found.dtype == expected.dtype
    assert (found.int() - expected.int()).abs().max() <= 1
    # Its softmax takes exponentials from a table of integers.
    assert (found != expected).double().mean() < (0.2 if operator == "QLinearSoftmax" else 0.02)
    assert expected.unique().numel() > 2


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("rows", [0, 1])
def test_gemm(quantized: bool, rows: int, tmp_path: Path) -> None:
    """A scale for each column, codes transposed, a bias of integers; as numbers where the result has no scale."""
    weights = {
        "as": np.float32(0.02), "az": np.uint8(120), "w": drawn(INT8, *((7, 20) if rows else (20, 7))),
        "ws": np.linspace(0.01, 0.05, 7, dtype=np.float32), "wz": np.zeros(7, np.int8), "c": np.arange(7, dtype=np.int32) * 100,
        "ys": np.float32(0.9), "yz": np.uint8(128),
    }  # fmt: skip
    inputs = "a as az w ws wz c" + (" ys yz" if quantized else "")
    used = {name: value for name, value in weights.items() if name in inputs.split()}
    path = saved(make([own("QGemm", inputs, transB=rows, alpha=1.0)], {"a": (["n", 20], UINT8)}, "y", used), tmp_path)
    given = {"a": torch.from_numpy(drawn(UINT8, 5, 20, seed=4))}
    (found,), (expected,) = imported(path, given), stock(path, given)
    assert found.dtype == expected.dtype
    assert (found.double() - expected.double()).abs().max() <= (1 if quantized else 1e-3)


@pytest.mark.parametrize("zero", [True, False])
def test_products_of_codes(zero: bool, tmp_path: Path) -> None:
    """`MatMulIntegerToFloat`, and `DynamicQuantizeMatMul`, which rounds its activations."""
    weights = {
        "w": drawn(UINT8, 20, 7), "as": np.float32(0.02), "ws": np.linspace(0.01, 0.05, 7, dtype=np.float32), "az": np.uint8(7),
        "wz": np.full(7, 130, np.uint8), "b": random(7),
    }  # fmt: skip
    for operator, inputs, kind in (
        ("MatMulIntegerToFloat", f"a w as ws az {'wz' if zero else '-'} b", UINT8),
        ("DynamicQuantizeMatMul", f"a w ws {'wz' if zero else '-'} b", FLOAT),
    ):
        used = {name: value for name, value in weights.items() if name in inputs.split()}
        path = saved(make([own(operator, inputs)], {"a": (["n", 20], kind)}, "y", used), tmp_path)
        given = {"a": torch.from_numpy(drawn(UINT8, 5, 20) if kind == UINT8 else random(5, 20))}
        (found,), (expected,) = imported(path, given), stock(path, given)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("kind", "bits"), [(UINT8, 4), (UINT8, 8), (UINT4, 4)])
def test_rows_of_a_table(kind: int, bits: int, zero: bool, tmp_path: Path) -> None:
    rows, columns, block = 10, 64, 16
    levels = np.random.default_rng(0).integers(0, 1 << bits, (rows, columns))
    points = np.random.default_rng(1).integers(0, 1 << bits, (rows, columns // block))

    def stored(name: str, values: np.ndarray[Any, Any]) -> Any:
        if kind == UINT4:
            return helper.make_tensor(name, UINT4, values.shape, values.reshape(-1).tolist())
        return (values[:, 0::2] | values[:, 1::2] << 4 if bits == 4 else values).astype(np.uint8)

    weights = {"t": stored("t", levels), "s": np.abs(random(rows, columns // block)) + 0.1}
    weights |= {"z": stored("z", points)} if zero else {}
    operator = own("GatherBlockQuantized", "t i s z" if zero else "t i s", gather_axis=0, quantize_axis=1, block_size=block, bits=bits)
    path = saved(make([operator], {"i": (["n", 3], INT64)}, "y", weights), tmp_path)
    given = {"i": torch.tensor([[0, 9, 4], [4, 1, 1]])}
    (found,), (expected,) = imported(path, given), stock(path, given)
    assert torch.equal(found, expected)
