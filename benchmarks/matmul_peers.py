"""The int4 products of onnxruntime and torch, over copies of one weight: what `matmul_cpu.py` is measured beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qcompile.quant.packing import unpack
from qcompile.quant.reference import Quantized

BITS = 4


@dataclass
class Case:
    """One product: x float32 [M, K], a weight [N, K] of 4 bits in groups, how many copies of it there are, and the threads."""

    x: Tensor
    weight: Quantized
    copies: int
    threads: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.x.shape[1] // self.weight.scale.shape[1]


@dataclass
class Run:
    """What is timed: `call` makes a product with every copy of the weight; `empty` is what calls of nothing cost beside it."""

    call: Callable[[], object]
    empty: Callable[[], object]
    out: Callable[[], Tensor]


def onnxruntime_product(case: Case) -> Run:
    """A model of one `MatMulNBits` a copy, accuracy level 4 (int8 activations), inputs and outputs bound; empty is one small node."""
    rows, columns = case.weight.codes.shape[0], case.x.shape[1]
    stored: dict[str, np.ndarray] = {
        "codes": case.weight.codes.view(rows, columns // case.group, case.group * BITS // 8).numpy(),
        "scale": case.weight.scale.float().flatten().numpy(),
    }
    if case.weight.zero is not None:
        stored["zero"] = case.weight.zero.flatten().numpy()
    nodes, constants = [], []
    for copy in range(case.copies):
        names = [f"{name}_{copy}" for name in stored]
        # No two copies are alike, or they could become one.
        turned = [np.roll(value, copy, axis=-1) for value in stored.values()]
        constants += [numpy_helper.from_array(value, name) for name, value in zip(names, turned, strict=True)]
        sizes = {"K": columns, "N": rows, "bits": BITS, "block_size": case.group, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", ["x", *names], [f"out_{copy}"], domain="com.microsoft", **sizes))
    shape = [case.x.shape[0], rows]
    bound = _bound(nodes, constants, case.x.numpy(), {f"out_{copy}": shape for copy in range(case.copies)}, case.threads)
    nothing = _bound([helper.make_node("Neg", ["x"], ["out_0"])], [], np.zeros((1, 1), np.float32), {"out_0": [1, 1]}, case.threads)
    return Run(bound.call, nothing.call, bound.out)


def _bound(nodes: list[object], constants: list[object], x: np.ndarray, shapes: dict[str, list[int]], threads: int) -> Run:
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))
    graph = helper.make_graph(nodes, "product", [taken], outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    made = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    for name, value in made.items():
        binding.bind_ortvalue_output(name, value)

    def call() -> None:
        session.run_with_iobinding(binding)

    return Run(call, call, lambda: torch.from_numpy(made["out_0"].numpy()))


def torch_product(case: Case, dtype: torch.dtype) -> Run:
    """`_weight_int4pack_mm_for_cpu` with activations of a dtype; empty is a sum of one element for each copy."""
    columns = case.x.shape[1]
    codes = unpack(case.weight.codes, BITS, columns).to(torch.int32)
    # Its numbers are `(code - 8) · scale + zero`.
    scale = case.weight.scale.float()
    zero = torch.zeros_like(scale)
    if case.weight.zero is not None:
        zero = (8.0 - unpack(case.weight.zero, BITS, scale.shape[1]).float()) * scale
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    pairs = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous().to(dtype)
    weights = [(packed.clone(), pairs.clone()) for _ in range(case.copies)]
    x, one, group = case.x.to(dtype), torch.ones(1), case.group
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

    def call() -> None:
        torch.set_num_threads(case.threads)
        for codes, factors in weights:
            multiply(x, codes, group, factors)

    def empty() -> None:
        for _ in weights:
            torch.ops.aten.neg(one)

    return Run(call, empty, lambda: multiply(x, packed, group, pairs).float())
