"""A graph as an `onnx_ir` model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, fx

from qcompile.errors import ExportError
from qcompile.exporters.onnx.cache import CacheInputs
from qcompile.exporters.onnx.emitter import DTYPES, MICROSOFT, Emitter, Value
from qcompile.exporters.onnx.last_tokens import head_of, kept_input, last_tokens
from qcompile.exporters.onnx.rules import RULES
from qcompile.ir.allowed import name_of
from qcompile.ir.graph import Graph
from qcompile.ir.verify import where
from qcompile.runtime.engines.onnxruntime import LOGITS_TO_KEEP
from qcompile.version import __version__

IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""Opset -> the version of the file format that came with it."""
LEAST_OPSET, LARGEST_OPSET = 21, 25


def make_model(graph: Graph, opset: int, profile: str, accuracy_level: int = 0, *, logits_to_keep: bool = False) -> ir.Model:
    """Write every operator of a graph; nothing is read of its constants yet.

    With `logits_to_keep` the file of a language model has an input of that name, if its head can be cut (`last_tokens`).

    Raises:
        ExportError: naming the first node that has no form in ONNX, and why.
    """
    e = Emitter(graph, opset, profile, accuracy_level)
    inputs = _inputs(e)
    head = head_of(graph) if logits_to_keep and graph.interface.kind == "cached_lm" else None
    kept = [] if head is None else [kept_input(e)]
    for node in graph.fx.nodes:
        if node.op == "call_function":
            with last_tokens(e, head, kept[0]) if head is node else contextlib.nullcontext():
                _write(e, node)
    outputs = _outputs(e)
    if graph.interface.kind == "cached_lm":
        inputs = [*e.shared["cache"].inputs, *kept]
    domains = {"": opset} | ({MICROSOFT: 1} if any(node.domain == MICROSOFT for node in e.nodes) else {})
    made = ir.Graph(inputs, outputs, nodes=e.nodes, initializers=_used(e), opset_imports=domains, name="qcompile")
    model = ir.Model(
        made, ir_version=IR_VERSIONS[opset], producer_name="qcompile", producer_version=__version__, metadata_props=_metadata(e)
    )
    RemoveUnusedNodesPass()(model)  # what undid something, and was undone
    return model


def _metadata(e: Emitter) -> dict[str, str]:
    """What the engine asks for (`runtime/engines/onnxruntime.py`): onnxruntime's attention takes one memory as past and as present."""
    if e.graph.interface.kind != "cached_lm":
        return {}
    makers = {value.producer() for state in e.shared["cache"].states for value in state.present}
    return {"qcompile.shared_past": "1"} if all(node is not None and node.op_type == "GroupQueryAttention" for node in makers) else {}


def _inputs(e: Emitter) -> list[Value]:
    if e.graph.interface.kind == "cached_lm":
        CacheInputs(e, e.graph.interface.symbols)
        return []
    inputs = []
    for node in e.graph.placeholders:
        value = ir.Value(name=node.name, shape=ir.Shape(_dims(e, node.meta["val"])), type=ir.TensorType(DTYPES[e.dtype(node)]))
        e.results[node] = value
        inputs.append(value)
    return inputs


def _dims(e: Emitter, value: Tensor) -> list[Any]:
    """Known sizes, and names of those that vary."""
    names = e.graph.interface.symbols
    return [size if isinstance(size, int) else names.get(str(size), f"size_{str(size).replace(' ', '')}") for size in value.shape]


def _write(e: Emitter, node: fx.Node) -> None:
    e.current = node
    rule = RULES.get(node.target)
    if rule is None:
        raise ExportError(
            f"export_onnx: {where(node)}: expected an operator that ONNX expresses, got {name_of(node.target) or node.target}; compile "
            "without the pass that made it, or keep the artifact"
        )
    try:
        e.results[node] = rule(e, node)
    except KeyError as error:
        raise e.refusal(f"expected a type that ONNX has, got {error}") from error
    finally:
        e.current = None


def _outputs(e: Emitter) -> list[Value]:
    """The graph's outputs, named; in a cached model the logits, then the present."""
    results: Any = e.graph.output.args[0]
    if e.graph.interface.kind == "cached_lm":
        cache: CacheInputs = e.shared["cache"]
        named = [("logits", e.value(results[0])), *cache.outputs]
    else:
        named = [(name, e.value(result)) for name, result in zip(output_names(e.graph), results, strict=True)]
    taken: set[Value] = set()
    made = [_named(e, taken, name, value) for name, value in named]
    if e.graph.interface.kind != "cached_lm":
        for value, result in zip(made, results, strict=True):
            value.type, value.shape = ir.TensorType(DTYPES[e.dtype(result)]), ir.Shape(_dims(e, result.meta["val"]))
    else:
        _describe(e, made, results[0])
    return made


def _named(e: Emitter, taken: set[Value], name: str, value: Value) -> Value:
    """A result under `name`: the value itself, or a copy of an input, a constant or what is a result already."""
    made = value if value.producer() is not None and value not in taken else e.op("Identity", value)
    made.name = name
    taken.add(made)
    return made


def _describe(e: Emitter, made: list[Value], logits: fx.Node) -> None:
    """Types of logits and of the present: those of the past, longer."""
    made[0].type = ir.TensorType(DTYPES[e.dtype(logits)])
    tokens = "kept" if LOGITS_TO_KEEP in e.initializers else "sequence"
    made[0].shape = ir.Shape(["batch", tokens, e.shape(logits)[-1]])
    past = [value for state in e.shared["cache"].states for value in state.values]
    for value, before in zip(made[1:], past, strict=True):
        sizes = list(before.shape or ())
        value.type, value.shape = before.type, ir.Shape([*sizes[:2], "total_sequence", *sizes[3:]])


def output_names(graph: Graph) -> list[str]:
    """What a caller knows the outputs by: keys of a mapping, or numbers."""
    names = dict(_paths(graph.interface.outputs, ""))
    results: Any = graph.output.args[0]
    return [names.get(index) or f"output_{index}" for index in range(len(results))]


def _paths(template: Any, path: str) -> Iterator[tuple[int, str]]:
    if template is None:
        return
    kind, content = next(iter(template.items()))
    if kind == "leaf":
        yield content, path
    elif kind == "dict":
        for key, item in content.items():
            yield from _paths(item, f"{path}.{key}" if path else key)
    elif kind != "value":
        for index, item in enumerate(content):
            yield from _paths(item, f"{path}.{index}" if path else f"output_{index}")


def _used(e: Emitter) -> list[Value]:
    """Initializers that something reads."""
    return [value for value in e.initializers.values() if value.uses() or value.is_graph_output()]
