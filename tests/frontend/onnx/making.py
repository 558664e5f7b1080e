"""Small ONNX models made by hand, and what onnxruntime says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from qcompile.frontend import load

Shape = Sequence[int | str | None]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node named after its first output; names are separated by blanks, `-` is an input left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), name=f"{outputs.split()[0]}_node", **attributes)


def make(
    nodes: Sequence[NodeProto], inputs: Mapping[str, tuple[Shape, int]], outputs: str, weights: Mapping[str, Any] | None = None, *,
    opset: int = 18, functions: Sequence[onnx.FunctionProto] = (), domains: Mapping[str, int] | None = None,
) -> ModelProto:  # fmt: skip
    """A model: inputs as name -> (shape, element type), names of outputs, weights as arrays or tensors."""
    graph = helper.make_graph(
        list(nodes),
        "made",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (shape, kind) in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs.split()],
        [
            value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            for name, value in (weights or {}).items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    opsets += [helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def saved(model: ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Where the model lies now."""
    path = folder / name
    onnx.save(model, path)
    return path


def imported(path: Path, inputs: Mapping[str, Tensor], dynamic_shapes: Any = None) -> list[Tensor]:
    """What the imported graph makes of `inputs`, traced with examples that the importer makes up."""
    graph = load(path, dynamic_shapes=dynamic_shapes).graph
    result = graph(**inputs)
    return list(result.values()) if isinstance(result, dict) else [result]


def stock(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What onnxruntime makes of `inputs`, in floats: by itself it rounds activations in front of packed weights to 8 bits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(np.array(item)) for item in results]


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(found: Tensor, expected: Tensor, close: float = 1e-5) -> bool:
    """Whether results are alike, relative to the largest: both sides add the same numbers in float32."""
    return bool((found - expected).abs().max() <= close * expected.abs().max())
