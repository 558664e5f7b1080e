"""Any `torch.export`-able module, or a program exported already, as a Graph."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.errors import QCompileError, TraceError
from qcompile.frontend import shapes
from qcompile.frontend.convert import Binder, Converter, identity, user_frame
from qcompile.ir.constants import Cast, Constant, tensor_constant
from qcompile.ir.data_sizes import settle_sizes
from qcompile.ir.graph import Graph

_HALF = (torch.float16, torch.bfloat16)


def capture_module(
    module: nn.Module, example_inputs: Any, dynamic_shapes: Any = None, *, name: str = "", bind: Binder | None = None
) -> Graph:
    """Trace `module` in evaluation mode; its weights are not copied, and half precision is traced (and bound) as float32.

    Args:
        module: on any device, `meta` included.
        example_inputs: a tensor, a tuple of positional inputs or a mapping of keyword inputs.
        dynamic_shapes: as `torch.export` takes it, where a dimension may also be a name: `{"x": {0: "batch"}}`. Without it
            dimension 0 of every input is symbolic (there is no silent fallback to a fixed one); `{}` fixes every dimension.
        name: what errors call the model (default: the class).
        bind: name and traced tensor -> constant, where the weights are not the module's own.

    Raises:
        TraceError: if the module cannot be traced, or fixes a dimension that was to vary.
        UnsupportedModelError: if an operator is not on the allow-list.
    """
    name = name or type(module).__name__
    inputs = shapes.as_inputs(example_inputs)
    parameters = _parameters(module)
    asked = shapes.default_shapes(inputs) if dynamic_shapes is None else shapes.given_shapes(dynamic_shapes, inputs, parameters)
    inputs = shapes.grown(inputs, asked)
    leaves = shapes.leaves(inputs, asked, parameters)
    traced, own = traceable(module)
    program = _export(traced, inputs, asked, name, leaves)
    graph = Converter(program, bind or own, name).graph()
    values = iter(graph.placeholders)
    nodes = [next(values) if isinstance(leaf, Tensor) else None for _, leaf, _ in leaves]
    graph.interface.symbols = shapes.symbols(leaves, [node and node.meta["val"] for node in nodes])
    graph.interface.examples = {
        node.name: leaf.detach().cpu() for node, (_, leaf, _) in zip(nodes, leaves, strict=True) if node is not None
    }
    settle_sizes(graph)
    return graph


def capture_exported(program: ExportedProgram, name: str = "exported") -> Graph:
    """A program that `torch.export.export` made, in the precision and with the symbols it was exported with."""
    graph = Converter(program, None, name).graph()
    for node in graph.placeholders:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                graph.interface.symbols.setdefault(str(size), f"{node.name}_{axis}")
    given = [leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor)]
    if len(given) == len(graph.placeholders):
        graph.interface.examples = {node.name: leaf.detach().cpu() for node, leaf in zip(graph.placeholders, given, strict=True)}
    settle_sizes(graph)
    return graph


def _parameters(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [item.name for item in inspect.signature(module.forward).parameters.values() if item.kind in kinds]


def traceable(module: nn.Module) -> tuple[nn.Module, Binder | None]:
    """The module itself or, where a weight is in half precision or not on the CPU, a copy for tracing and what its constants are.

    The copy's weights are float32 on the CPU and are never written or read, so that they take address space and no memory; it is
    not on `meta`, because a forward may mix weights with tensors that it makes on the CPU.
    """
    held = list(_tensors(module))
    if all(tensor.dtype not in _HALF and tensor.device.type == "cpu" for tensor in held) or all(tensor.is_meta for tensor in held):
        return module, None
    memo: dict[int, Any] = {id(tensor): _untouched(tensor) for tensor in held}
    originals = {identity(memo[id(tensor)]): tensor for tensor in held}

    def bind(_: str, traced: Tensor) -> Constant:
        constant = tensor_constant(originals.get(identity(traced), traced))
        return constant if constant.dtype == traced.dtype else constant.then(Cast(traced.dtype))

    return copy.deepcopy(module, memo), bind


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def _untouched(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32 if tensor.dtype in _HALF else tensor.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def stand_in(module: nn.Module) -> None:
    """Replace every weight of `module`, in place, by one on the CPU that takes address space and no memory; tied ones stay tied."""
    memo: dict[int, Any] = {id(tensor): _untouched(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        part._parameters.update({name: memo[id(tensor)] for name, tensor in part._parameters.items() if tensor is not None})
        part._buffers.update({name: memo[id(tensor)] for name, tensor in part._buffers.items() if tensor is not None})


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _export(module: nn.Module, inputs: shapes.Inputs, asked: Any, name: str, leaves: list[shapes.Leaf]) -> ExportedProgram:
    if any(tensor.is_meta for tensor in _tensors(module)):
        inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
    args, kwargs = inputs
    try:
        combined = inspect.signature(module.forward).bind(*asked[0], **asked[1]).arguments
        # torch prints the unfinished graph of a failed trace, which helps nobody beside the error.
        with torch.no_grad(), _evaluating(module), contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(module, args, kwargs, dynamic_shapes=combined, strict=False)
    except QCompileError:
        raise
    # Tracing runs the model's own code: any exception can come out of it, and each one is a model that cannot be traced.
    except Exception as error:
        raise TraceError(_explain(error, name, leaves)) from error


def _explain(error: Exception, name: str, leaves: list[shapes.Leaf]) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" For more information")[0]
    violated = re.search(r"Constraints violated \((.*?)\)!", str(error)) if isinstance(error, UserError) else None
    if violated:
        where = [
            f"dimension {axis} of {leaf}"
            for leaf, _, spec in leaves
            for axis, dim in shapes.dynamic_axes(spec).items()
            if _is_named(violated[1], leaf, axis, dim)
        ]
        fixed = re.search(r"specialized it to be a constant \((\d+)\)", str(error))
        bound = re.search(r"satisfy the generated guard (.*)", str(error))
        became = f"the model fixed it to {fixed[1]}" if fixed else f"the model needs {bound[1]}" if bound else first
        return (
            f"{name}: expected {' and '.join(where) or violated[1]} to vary freely, but {became}; "
            "remove the code that depends on this size, or pass dynamic_shapes with such a Dim or without it (`{}` fixes every dimension)"
        )
    place = user_frame((frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__))
    return (
        f"{name}{f' ({place})' if place else ''}: cannot be traced by torch.export: {type(error).__name__}: {first}; "
        "replace what depends on tensor values (branches, .item(), loops), or pass a program that torch.export.export made"
    )


def _is_named(violated: str, leaf: str, axis: int, dim: Any) -> bool:
    names = [item.strip() for item in violated.split(",")]
    return getattr(dim, "__name__", "") in names or any(f"'{leaf}'" in item and item.endswith(f"[{axis}]") for item in names)
