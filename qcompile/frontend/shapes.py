"""Which input dimensions stay symbolic: the defaults, what a caller may write, and the check that the trace kept its word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from qcompile.errors import TraceError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Leaf = tuple[str, Any, Any]


def as_inputs(example_inputs: Any) -> Inputs:
    """A tensor or a tuple as positional arguments, a mapping as keyword arguments; copied, so that no two are one tensor."""
    if isinstance(example_inputs, Mapping):
        given: Inputs = (), {str(key): value for key, value in example_inputs.items()}
    elif isinstance(example_inputs, Tensor):
        given = (example_inputs,), {}
    else:
        given = tuple(example_inputs), {}
    copied: Inputs = pytree.tree_map_only(Tensor, Tensor.clone, given)
    return copied


def default_shapes(inputs: Inputs) -> Any:
    """Dimension 0 of every tensor is `batch`, if it has the size that it has in the first tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    size = tensors[0].shape[0] if tensors else 0
    batch = Dim("batch", min=1)

    def spec(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else None

    return pytree.tree_map(spec, inputs)


def given_shapes(dynamic_shapes: Any, inputs: Inputs, parameters: Sequence[str]) -> Any:
    """What the caller wrote in the form `(args, kwargs)`; a dimension may be a name (`{0: "batch"}`), and an input left out is fixed.

    `parameters` are the names of the positional parameters of the module's forward.
    """
    args, kwargs = inputs
    dims: dict[str, Any] = {}

    def dimension(item: Any) -> Any:
        return dims.setdefault(item, Dim(item, min=1)) if isinstance(item, str) else item

    named = pytree.tree_map(dimension, dynamic_shapes)
    if isinstance(named, Mapping):
        unknown = set(named) - set(parameters) - set(kwargs)
        if unknown:
            raise TraceError(f"dynamic_shapes: expected names among {[*parameters, *kwargs]}, got {sorted(unknown)}")
        positional = [named.get(parameter) for parameter in parameters[: len(args)]]
        return (*positional, *[None] * (len(args) - len(positional))), {key: named.get(key) for key in kwargs}
    if len(named) != len(args):
        raise TraceError(
            f"dynamic_shapes: expected {len(args)} entries, one per positional input, got {len(named)}; name keyword inputs in a dict"
        )
    return tuple(named), dict.fromkeys(kwargs)


def leaves(inputs: Inputs, shapes: Any, parameters: Sequence[str]) -> list[Leaf]:
    """The inputs one by one: what to call it, its value, and the dynamic dimensions asked for it."""
    names = [*(parameters[index] if index < len(parameters) else f"input {index}" for index in range(len(inputs[0]))), *inputs[1]]
    found: list[Leaf] = []
    for name, value, spec in zip(names, [*inputs[0], *inputs[1].values()], [*shapes[0], *shapes[1].values()], strict=True):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            found.append((name + pytree.keystr(path), leaf, _at(spec, path)))
    return found


def _at(spec: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        if spec is None:
            return None
        spec = spec[getattr(step, "key", getattr(step, "idx", None))]
    return spec


def dynamic_axes(spec: Any) -> dict[int, Any]:
    """Axis -> Dim of one input, whichever of the ways torch.export accepts it was written in."""
    pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
    return {axis: item for axis, item in pairs if item is not None and not isinstance(item, int) and item is not Dim.STATIC}


def grown(inputs: Inputs, shapes: Any) -> Inputs:
    """Inputs whose dynamic axes have at least two elements, repeated where they have one: torch.export fixes a size of 1."""

    def grow(leaf: Any, spec: Any) -> Any:
        for axis in dynamic_axes(spec) if isinstance(leaf, Tensor) else ():
            if leaf.shape[axis] == 1:
                leaf = leaf.repeat_interleave(2, dim=axis)
        return leaf

    def each(value: Any, spec: Any) -> Any:
        flat, tree = pytree.tree_flatten_with_path(value)
        return pytree.tree_unflatten([grow(leaf, _at(spec, path)) for path, leaf in flat], tree)

    args = tuple(each(value, spec) for value, spec in zip(inputs[0], shapes[0], strict=True))
    return args, {key: each(value, shapes[1][key]) for key, value in inputs[1].items()}


def symbols(found: Sequence[Leaf], values: Sequence[Any]) -> dict[str, str]:
    """Symbol -> name of the dimension it counts, from the traced values of the inputs.

    Raises:
        TraceError: naming the input dimension that was asked to vary and became a number.
    """
    table: dict[str, str] = {}
    for (name, _, spec), value in zip(found, values, strict=True):
        for axis, dim in dynamic_axes(spec).items():
            size = value.shape[axis]
            if not isinstance(size, torch.SymInt) or str(size).isdigit():
                raise TraceError(
                    f"{name}: expected dimension {axis} to stay symbolic, but the model fixed it to {size}; "
                    "remove the code that depends on this size, or leave the dimension out of dynamic_shapes"
                )
            if str(size).isidentifier():
                table[str(size)] = getattr(dim, "__name__", "") if isinstance(dim, Dim) else f"{name.split('[')[0]}_{axis}"
    return table
