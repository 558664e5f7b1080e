"""A parsed ONNX file as steps: its inputs, weights, and the nodes of its graph and of the branches inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner

from qcompile.errors import SourceError, UnsupportedModelError
from qcompile.frontend.onnx import rules as _rules  # noqa: F401  registers the rules
from qcompile.frontend.onnx.registry import DOMAINS, RULES, domain_of
from qcompile.frontend.onnx.weights import Weight, weight_of

OLDEST_OPSET, NEWEST_OPSET = 7, 28
"""Versions of the standard operators that are read; what a later one adds to an operator is refused where it is used."""


@dataclass
class Step:
    """One node: attributes as Python values, graphs in them as blocks; metadata says what a node is for, and computes nothing."""

    operator: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Block:
    """A graph, or a branch of an `If`: its own inputs and constants, its steps, and the names of its results."""

    inputs: tuple[str, ...] = ()
    weights: dict[str, Weight] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """One input of the model; a dimension is a size, a name, or None where it varies without a name."""

    name: str
    kind: int
    shape: tuple[int | str | None, ...]


@dataclass
class Program:
    """A model: `opset` is the version of the standard operators."""

    path: Path
    opset: int
    inputs: list[InputSpec]
    body: Block
    metadata: dict[str, str]


def read_program(path: Path) -> Program:
    """Read and check an `.onnx` file; no weight is read.

    Raises:
        SourceError: for a file that is missing, damaged, or refers to what is not there.
        UnsupportedModelError: for operators, or a version of them, that are not served.
    """
    return program_of(_parse(path), path)


def program_of(model: ModelProto, path: Path) -> Program:
    """The steps of a parsed model; `path` is where it lies, for external data and messages."""
    model = _inlined(model, path)
    opset = _opset(model, path)
    graph = model.graph
    body = _block(graph, path, "")
    inputs = [_input(item, path) for item in graph.input if item.name not in body.weights]
    if not inputs:
        raise SourceError(f"{path}: expected a graph with inputs, got none; a model without inputs has nothing to compile")
    if not body.outputs:
        raise SourceError(f"{path}: expected a graph with outputs, got none; export the model again")
    _refuse_unknown(body, path)
    _check_names(body, path, {item.name for item in inputs})
    return Program(path, opset, inputs, body, {item.key: item.value for item in model.metadata_props})


def _parse(path: Path) -> ModelProto:
    try:
        model = onnx.load_model(path, load_external_data=False)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: expected an ONNX file, got none") from error
    except (DecodeError, OSError, ValueError) as error:
        raise SourceError(
            f"{path}: expected an ONNX model, got a file that is damaged or something else ({error}); download it again"
        ) from error
    if not model.HasField("graph") or not model.graph.node:
        raise SourceError(f"{path}: expected an ONNX model with a graph, got one without nodes; export or download it again")
    return model


def _opset(model: ModelProto, path: Path) -> int:
    versions = {domain_of(item.domain): item.version for item in model.opset_import}
    unknown = sorted({domain_of(node.domain) for node in _nodes(model.graph.node)} - set(DOMAINS))
    if unknown:
        raise UnsupportedModelError(
            f"{path}: expected operators of the domains {', '.join(map(repr, DOMAINS))}, got {', '.join(map(repr, unknown))}; "
            "export the model with standard operators"
        )
    version = versions.get("")
    if version is None and any(not domain_of(node.domain) for node in _nodes(model.graph.node)):
        raise SourceError(f"{path}: expected the version of the standard operators (opset_import), got none; export the model again")
    version = NEWEST_OPSET if version is None else version
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise UnsupportedModelError(
            f"{path}: expected opset {OLDEST_OPSET} to {NEWEST_OPSET}, got opset {version}; "
            "convert the model with onnx.version_converter, or export it with another opset_version"
        )
    return int(version)


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g.node)


def _inlined(model: ModelProto, path: Path) -> ModelProto:
    """The model without local functions, and without operators that have no rule here but are defined by others that may have one."""
    version = next((item.version for item in model.opset_import if not domain_of(item.domain)), 0)
    _fill_function_defaults(model)
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, DecodeError) as error:
        raise SourceError(
            f"{path}: expected functions that can be put in place of their calls, got {error}; export the model again"
        ) from error
    defined = [node for node in _nodes(model.graph.node) if _is_composite(node, version)]
    if not defined:
        return model
    for node in defined:
        schema = onnx.defs.get_schema(node.op_type, version).attributes.values()
        _fill_defaults(node, [attribute.default_value for attribute in schema if attribute.default_value.type])
    try:
        return inliner.inline_selected_functions(model, [("", node.op_type) for node in defined], inline_schema_functions=True)
    except (RuntimeError, ValueError, DecodeError):
        return model  # the operator is refused by name later


def _fill_function_defaults(model: ModelProto) -> None:
    defaults = {(item.domain, item.name): list(item.attribute_proto) for item in model.functions}
    bodies = [model.graph.node, *(item.node for item in model.functions)]
    for node in (node for body in bodies for node in _nodes(body)):
        _fill_defaults(node, defaults.get((node.domain, node.op_type), []))


def _fill_defaults(node: NodeProto, defaults: Sequence[AttributeProto]) -> None:
    """Write out the attributes that a call leaves to their defaults: the inliner forgets those."""
    given = {attribute.name for attribute in node.attribute}
    node.attribute.extend(attribute for attribute in defaults if attribute.name not in given)


def _is_composite(node: NodeProto, version: int) -> bool:
    if domain_of(node.domain) or (("", node.op_type) in RULES) or not onnx.defs.has(node.op_type):
        return False
    try:
        schema = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return False
    return any(getattr(schema, name, False) for name in ("has_function", "has_context_dependent_function"))


def _block(graph: GraphProto, path: Path, scope: str) -> Block:
    if graph.sparse_initializer:
        raise UnsupportedModelError(f"{path}: expected dense initialisers, got sparse ones; export the model without sparsity")
    block = Block(tuple(item.name for item in graph.input), outputs=tuple(item.name for item in graph.output))
    for proto in graph.initializer:
        block.weights[proto.name] = weight_of(proto, path, scope)
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" and not domain_of(node.domain):
            block.weights[node.output[0]] = _constant(node, path, scope)
        else:
            block.steps.append(_step(node, path, index, scope))
    return block


def _constant(node: NodeProto, path: Path, scope: str) -> Weight:
    (attribute,) = node.attribute if len(node.attribute) == 1 else (AttributeProto(),)
    value = helper.get_attribute_value(attribute) if attribute.type and not attribute.ref_attr_name else None
    name = node.output[0]
    if attribute.name == "value" and isinstance(value, TensorProto):
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = name
    elif attribute.name in ("value_int", "value_ints") and value is not None:
        listed = [value] if attribute.name == "value_int" else list(value)
        tensor = helper.make_tensor(name, TensorProto.INT64, [] if attribute.name == "value_int" else [len(listed)], listed)
    elif attribute.name in ("value_float", "value_floats") and value is not None:
        listed = [value] if attribute.name == "value_float" else list(value)
        tensor = helper.make_tensor(name, TensorProto.FLOAT, [] if attribute.name == "value_float" else [len(listed)], listed)
    else:
        raise UnsupportedModelError(f"{path}: Constant {name!r}: expected a dense tensor of numbers, got {attribute.name or 'nothing'}")
    return weight_of(tensor, path, scope)


def _step(node: NodeProto, path: Path, index: int, scope: str) -> Step:
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise SourceError(
                f"{path}: node {node.name!r} ({node.op_type}): expected a value of the attribute {attribute.name}, got a reference to "
                f"{attribute.ref_attr_name!r} of a function; export the model again"
            )
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.GRAPH:
            value = _block(value, path, f"{scope}{node.name or index}.{attribute.name}.")
        attributes[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    metadata = {item.key: item.value for item in node.metadata_props}
    name = node.name or (node.output[0] if node.output else f"node {index}")
    return Step(node.op_type, domain_of(node.domain), name, tuple(node.input), tuple(node.output), attributes, metadata)


def _input(item: onnx.ValueInfoProto, path: Path) -> InputSpec:
    if not item.type.HasField("tensor_type"):
        kind = item.type.WhichOneof("value") or "nothing"
        raise UnsupportedModelError(f"{path}: input {item.name!r}: expected a tensor, got {kind}; export the model with tensors as inputs")
    tensor = item.type.tensor_type
    if not tensor.HasField("shape"):
        raise UnsupportedModelError(
            f"{path}: input {item.name!r}: expected a shape (numbers or names), got none; export the model with shapes"
        )
    sizes = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return InputSpec(item.name, tensor.elem_type, sizes)


def _check_names(block: Block, path: Path, outer: set[str]) -> None:
    """Every value is made before it is read.

    Raises:
        SourceError: naming the node and the value that nothing gives.
    """
    known = outer | set(block.weights) | set(block.inputs)
    for step in block.steps:
        for name in step.inputs:
            if name and name not in known:
                raise SourceError(
                    f"{path}: node {step.name!r} ({step.operator}): expected the value {name!r} from an input, an initialiser or an "
                    "earlier node, got none; the file is incomplete, or its nodes are out of order"
                )
        for inner in blocks_of(step):
            _check_names(inner, path, known)
        known |= set(step.outputs)
    missing = [name for name in block.outputs if name not in known]
    if missing:
        raise SourceError(f"{path}: output {missing[0]!r}: expected a node that computes it, got none; export the model again")


def blocks_of(step: Step) -> list[Block]:
    """The branches of a step."""
    return [value for value in step.attributes.values() if isinstance(value, Block)]


def _refuse_unknown(block: Block, path: Path) -> None:
    """Operators without a rule, the first five by name and node; a branch may hold some, because it may not be taken."""
    unknown = [step for step in block.steps if (step.domain, step.operator) not in RULES]
    if unknown:
        shown = "; ".join(f"{step.domain + '.' if step.domain else ''}{step.operator} (node {step.name!r})" for step in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UnsupportedModelError(
            f"{path}: expected operators that the importer has a rule for, got {shown}{more}; "
            "see docs/onnx-operators.md, and export the model without them"
        )
