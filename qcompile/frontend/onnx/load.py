"""An `.onnx` file as a graph."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import traceback

from qcompile.errors import TraceError, UnsupportedModelError
from qcompile.frontend.capture import capture_module
from qcompile.frontend.loaded import Loaded
from qcompile.frontend.onnx.assets import beside
from qcompile.frontend.onnx.causal import finish
from qcompile.frontend.onnx.fusions import fuse
from qcompile.frontend.onnx.inputs import bounded_shapes, free_shapes, given_inputs, made_inputs, name_symbols
from qcompile.frontend.onnx.inputs import dynamic_shapes as named_shapes
from qcompile.frontend.onnx.interpreter import OnnxModule
from qcompile.frontend.onnx.language import language_model, layers
from qcompile.frontend.onnx.program import Program, read_program
from qcompile.frontend.onnx.read_back import read_back
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.graph import Graph
from qcompile.ir.records import Assets


def load_onnx(path: Path, example_inputs: Any = None, dynamic_shapes: Any = None) -> Loaded:
    """An ONNX model of opset 7 to 28: inputs by name, one result as a tensor, several by name.

    Weights stay where they are until they are needed. Half precision is traced as float32. A causal language model (`input_ids` and
    perhaps a past go in, `logits` come out) is read without its past and present, because the compiler brings its own cache.

    Args:
        path: the `.onnx` file; external data lies beside it.
        example_inputs: a tensor, a tuple or a mapping; by default made from the types and shapes that the file tells.
        dynamic_shapes: by default the dimensions that the file gives names to, or no size.

    Raises:
        SourceError: for a file that is missing, damaged, or refers to what is not there.
        UnsupportedModelError: for operators, or uses of them, without a rule: named, with the node.
        TraceError: for inputs that do not fit, or a dimension that the model fixes.
    """
    program = read_program(path)
    read_back(program)
    if example_inputs is None and dynamic_shapes is None:
        graph = _language_model(program)
        if graph is not None:
            return Loaded(graph, beside(path, int(graph.output.args[0][0].meta["val"].shape[-1])))  # type: ignore[index, union-attr]
    fuse(program.body)
    return Loaded(capture_program(program, example_inputs, dynamic_shapes), Assets(model_type="onnx", name=path.name))


def _language_model(program: Program) -> Graph | None:
    """The graph of a causal language model without its cache; None for any other, with a warning where the names promised one."""
    found = language_model(program)
    if found is None:
        return None
    fuse(found.body)
    try:
        graph = capture_program(found)
        reason = finish(graph, layers(program))
    except (TraceError, UnsupportedModelError) as error:
        reason = str(error)
    if reason:
        warnings.warn(f"{program.path}: compiled as a plain module, not as a language model: {reason}", stacklevel=3)
    return None if reason else graph


def capture_program(program: Program, example_inputs: Any = None, dynamic_shapes: Any = None) -> Graph:
    """Trace a program; constants are called as in the file."""
    module = OnnxModule(program)
    keywords = module.keywords
    inputs = made_inputs(program, keywords) if example_inputs is None else given_inputs(program, keywords, example_inputs)
    shapes = named_shapes(program, keywords) if dynamic_shapes is None else dynamic_shapes

    def bind(name: str, traced: Tensor) -> Constant:
        return module.weights[name].constant() if name in module.weights else tensor_constant(traced)

    def trace(wanted: Any) -> Graph:
        with traceback.preserve_node_meta():
            return capture_module(module, inputs, wanted, name=str(program.path), bind=bind)

    try:
        graph = trace(shapes)
    except TraceError as error:
        if dynamic_shapes is not None or not any(shapes.values()):
            raise
        # A size may have bounds (a table of positions, a kernel), or be tied to another: then a trace finds them out.
        try:
            graph = trace(free_shapes(shapes))
        except TraceError:
            raise error from None
        # Once more with names, so that dimensions of one name are one symbol; where other ties are in the way, without.
        with contextlib.suppress(TraceError):
            graph = trace(bounded_shapes(graph, program, keywords))
    name_symbols(graph, program, keywords)
    _rename(graph, {buffer: weight.name for buffer, weight in module.weights.items()})
    return graph


def _rename(graph: Graph, names: dict[str, str]) -> None:
    """Give constants the names of the file; branches may use one name twice."""
    taken = set(graph.constants) - set(names)
    table: dict[str, str] = {}
    for name in graph.constants:
        wanted, count = names.get(name, name), 0
        unique = wanted
        while name in names and unique in taken:
            count += 1
            unique = f"{wanted}_{count}"
        taken.add(unique)
        table[name] = unique
    graph.constants = {table[name]: constant for name, constant in graph.constants.items()}
    for node in graph.fx.find_nodes(op="get_attr"):
        node.target = table[str(node.target)]
        node._rename(re.sub(r"\W", "_", str(node.target)))
