"""Example inputs and dimensions that vary, from what an ONNX file says about its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from qcompile.errors import TraceError, UnsupportedModelError
from qcompile.frontend.onnx.interpreter import keyword_names
from qcompile.frontend.onnx.kinds import STORED, kind_name
from qcompile.frontend.onnx.program import InputSpec, Program
from qcompile.ir.graph import Graph

_NAME = re.compile(r"[A-Za-z_][\w.:/ -]*")
_FEW = 3
_UNBOUNDED = 1 << 62


def given_inputs(program: Program, keywords: Mapping[str, str], example_inputs: Any) -> dict[str, Tensor]:
    """What the caller passes, by keyword: a tensor, a tuple in the model's order, or a mapping by ONNX names or keywords.

    Raises:
        TraceError: for an input too many, one too few, or one of another type or fixed size.
    """
    if isinstance(example_inputs, Mapping):
        table = {**{keyword: keyword for keyword in keywords.values()}, **keywords}
        found = {table.get(str(name), str(name)): value for name, value in example_inputs.items()}
    else:
        listed = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        found = dict(zip(keywords.values(), listed, strict=False))
        if len(listed) != len(keywords):
            raise TraceError(f"{program.path}: expected {len(keywords)} inputs ({', '.join(keywords)}), got {len(listed)}")
    if set(found) != set(keywords.values()):
        raise TraceError(f"{program.path}: expected the inputs {', '.join(keywords.values())}, got {', '.join(found)}")
    for item in program.inputs:
        _check(item, found[keywords[item.name]], program.path)
    return {keyword: found[keyword] for keyword in keywords.values()}


def _check(item: InputSpec, value: Any, path: Path) -> None:
    if not isinstance(value, Tensor):
        raise TraceError(f"{path}: input {item.name!r}: expected a tensor, got {type(value).__name__}")
    half = (torch.float16, torch.bfloat16)
    wanted = STORED[item.kind]
    if value.dtype != wanted and not (wanted in half and value.dtype == torch.float32):
        raise TraceError(f"{path}: input {item.name!r}: expected {wanted}, got {value.dtype}; convert it")
    fits = value.dim() == len(item.shape) and all(
        not isinstance(size, int) or size == found for size, found in zip(item.shape, value.shape, strict=True)
    )
    if not fits:
        raise TraceError(f"{path}: input {item.name!r}: expected the shape {list(item.shape)}, got {list(value.shape)}")


def made_inputs(program: Program, keywords: Mapping[str, str]) -> dict[str, Tensor]:
    """Small inputs of the types and shapes that the file tells; dimensions of one name have one size, others different ones."""
    sizes = dimension_sizes(program.inputs)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for item in program.inputs:
        if item.kind not in STORED:
            raise UnsupportedModelError(f"{program.path}: input {item.name!r}: expected numbers, got {kind_name(item.kind)}")
        shape = [size if isinstance(size, int) else sizes[_label(item, axis)] for axis, size in enumerate(item.shape)]
        made[keywords[item.name]] = _example(item, shape, _rows(program, item.name), generator)
    return made


def _example(item: InputSpec, shape: Sequence[int], rows: int, generator: torch.Generator) -> Tensor:
    dtype = STORED[item.kind]
    if dtype.is_floating_point:
        return torch.randn(list(shape), generator=generator).to(dtype if dtype.itemsize > 2 else torch.float32)
    if dtype == torch.bool or "mask" in item.name.lower():
        return torch.ones(list(shape), dtype=dtype)
    if "position" in item.name.lower() and shape:
        return torch.arange(shape[-1]).expand(list(shape)).to(dtype).contiguous()
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * 7 + 3) % rows).reshape(list(shape)).to(dtype)


def _rows(program: Program, name: str) -> int:
    """Rows of the smallest table that an input of integers chooses from, directly or through casts; a few where none is found."""
    same, found = {name}, []
    for step in program.body.steps:
        if step.operator in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten") and step.inputs[0] in same:
            same.add(step.outputs[0])
        if step.operator == "Gather" and step.inputs[1] in same and step.inputs[0] in program.body.weights:
            found.append(program.body.weights[step.inputs[0]].shape[0])
    return max(min(found, default=_FEW), 1)


def _label(item: InputSpec, axis: int) -> str:
    size = item.shape[axis]
    return size if isinstance(size, str) else f"{item.name}_{axis}"


def _labels(inputs: Sequence[InputSpec]) -> Iterator[tuple[str, InputSpec, int]]:
    for item in inputs:
        for axis, size in enumerate(item.shape):
            if not isinstance(size, int):
                yield _label(item, axis), item, axis


def dimension_sizes(inputs: Sequence[InputSpec]) -> dict[str, int]:
    """Name of a dimension -> a small size: 2 and up for first axes, 8 and up for others, multiples of 32 for images; sums of names fit."""
    sizes: dict[str, int] = {}
    for label, item, axis in _labels(inputs):
        if label in sizes or not _is_name(label):
            continue
        image = len(item.shape) in (4, 5) and axis >= 2 and STORED.get(item.kind, torch.int64).is_floating_point
        start, step = (64, 32) if image else (2, 1) if axis == 0 else (8, 1)
        while start in sizes.values():
            start += step
        sizes[label] = start
    for label, _, _ in _labels(inputs):
        sizes.setdefault(label, _evaluated(label, sizes))
    return sizes


def _is_name(label: str) -> bool:
    return _NAME.fullmatch(label) is not None and not re.search(r"\s-\s", label)


def _evaluated(label: str, sizes: Mapping[str, int]) -> int:
    """A size such as `past_sequence_length + 1`, of names that other inputs have."""
    parts = [part.strip() for part in label.split("+")]
    known = [int(part) if part.isdigit() else sizes.get(part) for part in parts]
    return sum(part for part in known if part is not None) if None not in known else 11


def dynamic_shapes(program: Program, keywords: Mapping[str, str], longest: Mapping[str, int] | None = None) -> dict[str, dict[int, Any]]:
    """Per keyword, which axes vary: equal names are one dimension, sums of names are left to the trace to relate.

    `longest` gives bounds by name.
    """
    labels = list(dict.fromkeys(label for label, _, _ in _labels(program.inputs)))
    names = keyword_names(labels)
    limits = longest or {}
    dims = {label: Dim(names[label], min=1, max=limits.get(label)) if _is_name(label) else Dim.AUTO for label in labels}
    shapes: dict[str, dict[int, Any]] = {keyword: {} for keyword in keywords.values()}
    for label, item, axis in _labels(program.inputs):
        shapes[keywords[item.name]][axis] = dims[label]
    return shapes


def free_shapes(shapes: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
    """The same axes, left to the trace to relate and to bound."""
    return {keyword: dict.fromkeys(axes, Dim.AUTO) for keyword, axes in shapes.items()}


def bounded_shapes(graph: Graph, program: Program, keywords: Mapping[str, str]) -> dict[str, dict[int, Any]]:
    """`dynamic_shapes` with the longest sizes that a trace of free axes found for each name."""
    longest: dict[str, int] = {}
    values = {node.name: node.meta["val"] for node in graph.placeholders}
    for label, item, axis in _labels(program.inputs):
        size = values[keywords[item.name]].shape[axis]
        upper = size.node.shape_env.bound_sympy(size.node.expr).upper
        if upper.is_Integer and int(upper) < _UNBOUNDED:
            longest[label] = min(int(upper), longest.get(label, _UNBOUNDED))
    return dynamic_shapes(program, keywords, longest)


def name_symbols(graph: Graph, program: Program, keywords: Mapping[str, str]) -> None:
    """Call dimensions as the file does where the trace was left to relate them."""
    labels = {f"{keywords[item.name]}_{axis}": label for label, item, axis in _labels(program.inputs) if _is_name(label)}
    symbols = graph.interface.symbols
    symbols.update({symbol: labels.get(name, name) for symbol, name in symbols.items()})
