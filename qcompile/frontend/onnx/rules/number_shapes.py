"""Moving numbers about that are known while tracing: what `Shape` gives, sliced, gathered and concatenated into another shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import number_rule, rule
from qcompile.frontend.onnx.values import Held, NotNumbersError, Numbers, RefusalError, is_symbolic, known_numbers, numbers_of, objects

_MOST = 1024


def _plain(items: list[Any]) -> list[int]:
    if any(is_symbolic(item) for item in items):
        raise NotNumbersError
    return [int(item) for item in items]


@rule("Shape")
def shape(node: Node) -> Numbers:
    """Sizes from `start` to `end`."""
    value = node.value(0)
    sizes = list(value.array.shape if isinstance(value, Numbers) else node.tensor(0).shape)
    return numbers_of(sizes[node.attribute("start", 0) : node.attribute("end")])


@rule("Size")
def size(node: Node) -> Numbers:
    """Number of elements."""
    value = node.value(0)
    return numbers_of([math.prod(value.array.shape if isinstance(value, Numbers) else node.tensor(0).shape)], shape=[])


@number_rule("Gather")
def gather(node: Node) -> Numbers:
    """Along one axis."""
    data, indices = node.numbers(0), node.numbers(1)
    places = np.array(_plain(indices.flat), dtype=np.int64).reshape(indices.array.shape)
    return Numbers(objects_like(np.take(data.array, places, axis=node.integer("axis", 0))), data.dtype)


def objects_like(array: Any) -> Any:
    """An object array again, where numpy gave back the element of an array without dimensions."""
    return array if isinstance(array, np.ndarray) else objects([array], [])


@number_rule("Concat")
def concat(node: Node) -> Numbers:
    """Along one axis."""
    parts = [node.numbers(index) for index in range(len(node.inputs))]
    return Numbers(np.concatenate([part.array for part in parts], axis=int(node.required("axis"))), parts[0].dtype)


@number_rule("Slice")
def cut(node: Node) -> Numbers:
    """Starts, ends, axes and steps as attributes or as inputs."""
    data = node.numbers(0)
    starts, ends, axes, steps = slice_bounds(node, data.array.ndim)
    parts = [slice(None)] * data.array.ndim
    for start, end, axis, step in zip(_plain(starts), _plain(ends), axes, _plain(steps), strict=True):
        parts[axis] = slice(start, None if step < 0 and end < -data.array.shape[axis] else end, step)
    return Numbers(objects_like(data.array[tuple(parts)]), data.dtype)


def slice_bounds(node: Node, dims: int) -> tuple[list[Any], list[Any], list[int], list[Any]]:
    """Starts, ends, axes (from 0) and steps of a `Slice` of any version."""
    if node.attribute("starts") is not None:
        starts, ends, axes = node.integers("starts") or [], node.integers("ends") or [], node.integers("axes")
        steps: list[Any] | None = None
    else:
        starts, ends = node.elements(1, "starts"), node.elements(2, "ends")
        axes = node.elements(3, "axes") if node.has(3) else None
        steps = node.elements(4, "steps") if node.has(4) else None
    where = [int(axis) % dims for axis in (range(len(starts)) if axes is None else axes)]
    return starts, ends, where, steps or [1] * len(starts)


@number_rule("Unsqueeze")
def unsqueeze(node: Node) -> Numbers:
    """New axes of one element."""
    data, axes = node.numbers(0), node.axes() or []
    return Numbers(np.expand_dims(data.array, tuple(axes)), data.dtype)


@number_rule("Squeeze")
def squeeze(node: Node) -> Numbers:
    """Without axes of one element."""
    data, axes = node.numbers(0), node.axes()
    return Numbers(objects_like(np.squeeze(data.array, None if axes is None else tuple(axes))), data.dtype)


@number_rule("Reshape")
def reshape(node: Node) -> Numbers:
    """To sizes that are known."""
    data, wanted = node.numbers(0), _plain(node.elements(1, "shape"))
    if not node.flag("allowzero"):
        wanted = [data.array.shape[axis] if item == 0 else item for axis, item in enumerate(wanted)]
    return Numbers(data.array.reshape(wanted), data.dtype)


@number_rule("Flatten")
def flatten(node: Node) -> Numbers:
    """To a matrix."""
    data, axis = node.numbers(0), node.integer("axis", 1)
    axis = axis + data.array.ndim if axis < 0 else axis
    return Numbers(data.array.reshape(math.prod(data.array.shape[:axis]), -1), data.dtype)


@number_rule("Transpose")
def transpose(node: Node) -> Numbers:
    """Axes in another order."""
    data = node.numbers(0)
    return Numbers(np.transpose(data.array, node.integers("perm")), data.dtype)


@number_rule("Expand")
def expand(node: Node) -> Numbers:
    """Broadcast to sizes that are known, as long as the result is small."""
    data, wanted = node.numbers(0), _plain(node.elements(1, "shape"))
    both = np.broadcast_shapes(data.array.shape, tuple(wanted))
    if math.prod(both) > _MOST:
        raise NotNumbersError
    return Numbers(np.broadcast_to(data.array, both), data.dtype)


@number_rule("Tile")
def tile(node: Node) -> Numbers:
    """Repeated, as long as the result is small."""
    data, repeats = node.numbers(0), _plain(node.elements(1, "repeats"))
    if math.prod(repeats) * data.array.size > _MOST:
        raise NotNumbersError
    return Numbers(np.tile(data.array, repeats), data.dtype)


@number_rule("ConstantOfShape")
def constant_of_shape(node: Node) -> Numbers:
    """One number everywhere, as long as the result is small and its size known."""
    sizes = _plain(node.elements(0, "shape"))
    if math.prod(sizes) > _MOST:
        raise NotNumbersError
    value, dtype = fill_value(node)
    return numbers_of([value] * math.prod(sizes), dtype, sizes)


def fill_value(node: Node) -> tuple[Any, torch.dtype]:
    """The number that `ConstantOfShape` fills with (0 in float32 if it says nothing), and its dtype."""
    from onnx import TensorProto

    from qcompile.frontend.onnx.weights import Weight

    proto = node.attribute("value")
    if not isinstance(proto, TensorProto):
        return 0.0, torch.float32
    known = known_numbers(Weight("", "value", proto.data_type, tuple(proto.dims), proto))
    if len(known.flat) != 1:
        raise RefusalError(f"expected one number to fill with, got {len(known.flat)}")
    return known.flat[0], known.dtype


@number_rule("Split")
def split(node: Node) -> tuple[Numbers, ...]:
    """Numbers in one dimension, in parts."""
    data = node.numbers(0)
    axis = node.integer("axis", 0) % data.array.ndim
    parts = split_sizes(node, data.array.shape[axis])
    cuts = np.cumsum(_plain(list(parts)))[:-1]
    return tuple(Numbers(part, data.dtype) for part in np.split(data.array, cuts.tolist(), axis))


def split_sizes(node: Node, size: Any) -> list[Any]:
    """Sizes of the parts of a `Split` of any version; equal ones, the last smaller, where none are told."""
    told = node.integers("split")
    if told is None and node.has(1):
        told = node.elements(1, "split")
    if told is not None:
        return told
    count = node.integer("num_outputs", len(node.outputs))
    if is_symbolic(size):
        each = (size + count - 1) // count
        return [*[each] * (count - 1), size - each * (count - 1)]
    each = -(-size // count)
    return [*[each] * (count - 1), size - each * (count - 1)]


@number_rule("NonZero")
def nonzero(node: Node) -> Numbers:
    """Places of numbers that are not 0: [dimensions, count]."""
    data = node.numbers(0)
    found = np.nonzero(np.array(_plain(data.flat)).reshape(data.array.shape))
    return numbers_of([int(item) for row in found for item in row], torch.int64, [data.array.ndim, len(found[0]) if found else 0])


@number_rule("ScatterND")
def scatter(node: Node) -> Numbers:
    """Numbers of one dimension, some of them replaced."""
    data, indices, updates = (node.numbers(index) for index in range(3))
    if node.text("reduction", "none") != "none" or data.array.ndim != 1 or indices.array.ndim != 2 or indices.array.shape[1] != 1:
        raise NotNumbersError
    array = data.array.copy()
    for place, item in zip(_plain(indices.flat), updates.flat, strict=True):
        array[place] = item
    return Numbers(array, data.dtype)


@rule("NonZero")
def nonzero_of_tensor(node: Node) -> Any:
    """Places of what is not 0, [dimensions, count]: of constants known, of others as many as their values make."""
    known = node.value(0)
    if isinstance(known, Held) and known.weight.numel <= 1 << 20:
        places = np.nonzero(np.array(known.weight.elements()).reshape(known.weight.shape))
        return torch.tensor([row.tolist() for row in places], dtype=torch.int64)
    return torch.nonzero(node.tensor(0)).t()
