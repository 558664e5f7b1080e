"""What was written, read again by onnx's checker and run by onnxruntime beside the graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from qcompile.errors import ExportError
from qcompile.exporters.onnx.model import LARGEST_OPSET, LEAST_OPSET
from qcompile.ir.graph import Graph

Arrays = dict[str, Any]
EXACT, ROUNDED = 1e-3, 5e-2
"""How far results may lie apart, relative to the largest: where floats are multiplied, and where a rounding may turn to the next code."""


def newest_opset() -> int:
    """The newest opset that this exporter writes and the installed onnxruntime serves."""
    for opset in range(min(LARGEST_OPSET, onnx.defs.onnx_opset_version()), LEAST_OPSET, -1):
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "probe", [value], [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
        try:
            session(model.SerializeToString())
        except Exception:  # whatever onnxruntime says: it does not serve this one
            continue
        return opset
    return LEAST_OPSET


def session(model: str | bytes, *, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU that multiplies packed weights with float activations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Without this a fused product rounds activations to 8 bits, which the graph does not.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def check_file(path: Path) -> None:
    """Hold a file against the standard.

    Raises:
        ExportError: if onnx's checker refuses it.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"export_onnx: {path}: expected a valid file, got: {str(error).splitlines()[0]}; report this") from error


def compare(path: Path, graph: Graph) -> tuple[float | None, str]:
    """The greatest difference from the graph's own result, relative to the greatest of these; None and why if it could not be run."""
    try:
        run = session(str(path))
    except Exception as error:  # an operator or type that this onnxruntime does not serve: the file may be right all the same
        return None, str(error).strip().splitlines()[0]
    cached = graph.interface.kind == "cached_lm"
    results = _cached(run, graph) if cached else _plain(run, graph)
    del run  # its weights go before the graph's are read
    worst = 0.0
    for found, expected in zip(results, _expected(graph) if cached else _own(graph), strict=True):
        if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
            return float("inf"), ""
        if not expected.numel():
            continue
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
    return worst, ""


def _plain(run: Any, graph: Graph) -> list[Tensor]:
    return [_tensor(array) for array in run.run(None, {name: tensor.numpy() for name, tensor in graph.interface.examples.items()})]


def _own(graph: Graph) -> list[Tensor]:
    return [tensor.double() for tensor in graph.run([graph.interface.examples[node.name] for node in graph.placeholders])]


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def _prompts(graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """Example tokens [B, S] as prompts of two lengths [B], padded on the right; and which are real [B, S]."""
    ids = graph.interface.examples["input_ids"]
    lengths = torch.tensor([max(1, ids.shape[1] - 2 * (row % 2)) for row in range(len(ids))])
    return ids, lengths, torch.arange(ids.shape[1]) < lengths.unsqueeze(1)


def _cached(run: Any, graph: Graph) -> list[Tensor]:
    """Logits of the prompts, and behind each of their first token once more."""
    ids, _, real = _prompts(graph)
    new, mask = ids[:, :1], real.long()
    whole, past = step(run, ids, mask, empty_past(run, len(ids)))
    behind, _ = step(run, new, torch.cat((mask, torch.ones_like(new)), 1), past)
    return [whole[real], behind[:, 0]]


def _expected(graph: Graph) -> list[Tensor]:
    """The same of the graph."""
    ids, lengths, real = _prompts(graph)
    new = ids[:, :1]
    longer = torch.cat((ids, new), 1).scatter(1, lengths.unsqueeze(1), new)
    logits = _reference(graph, longer, lengths + 1)
    return [logits[:, :-1][real], logits[torch.arange(len(ids)), lengths]]


def _reference(graph: Graph, ids: Tensor, lengths: Tensor) -> Tensor:
    """The graph's logits [B, S, V] of prompts padded on the right, before an empty cache."""
    place = torch.arange(ids.shape[1])
    given = dict(graph.interface.examples)
    page_tokens = next(given[node.name].shape[2] for node in graph.states if not node.name.startswith("recent"))
    pages = -(-ids.shape[1] // page_tokens)
    given |= {"input_ids": ids, "positions": torch.where(place < lengths.unsqueeze(1), place, -1)}
    given["page_table"] = torch.arange(len(ids) * pages, dtype=torch.int32).view(len(ids), pages)
    given |= {node.name: given[node.name].new_zeros(len(ids) * pages, *given[node.name].shape[1:]) for node in graph.states}
    logits: Tensor = graph.run([given[node.name] for node in graph.placeholders])[0]
    return logits.double()


def empty_past(run: Any, batch: int) -> Arrays:
    """No tokens: what every input of the past is at first."""
    kinds = {
        "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
    }  # fmt: skip
    past = [given for given in run.get_inputs() if given.name.startswith("past_key_values.")]
    return {given.name: _empty(given, [batch, given.shape[1], 0, given.shape[3]], kinds) for given in past}


def _empty(given: Any, shape: list[int], kinds: Mapping[str, Any]) -> Any:
    import onnxruntime

    if given.type in kinds:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kinds[given.type]))
    code = {"tensor(float8e4m3fn)": onnx.TensorProto.FLOAT8E4M3FN, "tensor(bfloat16)": onnx.TensorProto.BFLOAT16}[given.type]
    wide = np.uint8 if "float8" in given.type else np.uint16
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, wide), code)


def step(run: Any, ids: Tensor, mask: Tensor, past: Arrays) -> tuple[Tensor, Arrays]:
    """Logits [B, S, V] after tokens [B, S] behind a past, and the past that comes next; mask [B, P + S]."""
    import onnxruntime

    given = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in (("input_ids", ids), ("attention_mask", mask))
    }
    names = [output.name for output in run.get_outputs()]
    logits, *present = run.run_with_ort_values(names, {**given, **past})
    return _tensor(logits.numpy()), {_past(name): value for name, value in zip(names[1:], present, strict=True)}


def _past(name: str) -> str:
    """The input that an output of the present becomes."""
    return name.replace("present.", "past_key_values.", 1)
