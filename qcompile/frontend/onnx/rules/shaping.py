"""Shapes and types of tensors: views, casts, padding, and tensors made from sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.kinds import BITS, LARGEST, RANGES, kind_name
from qcompile.frontend.onnx.node import Node, dtype_of
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.rules.number_shapes import fill_value, slice_bounds, split_sizes
from qcompile.frontend.onnx.values import Held, RefusalError, is_symbolic


@rule("Reshape")
def reshape(node: Node) -> Tensor:
    """To a shape where 0 keeps a size (unless `allowzero`) and -1 takes what is left."""
    x, wanted = node.tensor(0), node.elements(1, "the shape")
    keeps = not node.flag("allowzero")
    return x.reshape([x.shape[axis] if keeps and not is_symbolic(size) and size == 0 else size for axis, size in enumerate(wanted)])


@rule("Transpose")
def transpose(node: Node) -> Tensor:
    """Axes in another order, by default reversed."""
    x, order = node.tensor(0), node.integers("perm")
    if order is None:
        order = list(range(x.dim()))[::-1]
    return x.t() if order == [1, 0] else x.permute(order)


@rule("Unsqueeze")
def unsqueeze(node: Node) -> Tensor:
    """New axes of one element, counted in the result."""
    x, axes = node.tensor(0), node.axes() or []
    dims = x.dim() + len(axes)
    for axis in sorted(axis % dims for axis in axes):
        x = x.unsqueeze(axis)
    return x


@rule("Squeeze")
def squeeze(node: Node) -> Tensor:
    """Without axes of one element; all of them where none are told."""
    x, axes = node.tensor(0), node.axes()
    if axes is None and any(is_symbolic(size) for size in x.shape):
        raise RefusalError("expected the axes to squeeze, or sizes that do not vary, got neither")
    if axes is None:
        return x.squeeze()
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        if not is_symbolic(x.shape[axis]) and x.shape[axis] != 1:
            raise RefusalError(f"expected 1 element along axis {axis}, got {x.shape[axis]}")
        x = x.squeeze(axis)
    return x


@rule("Flatten")
def flatten(node: Node) -> Tensor:
    """To a matrix: the axes before `axis`, and those from it on."""
    x, axis = node.tensor(0), node.integer("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(1) if axis == 1 and x.dim() > 1 else x.reshape(_product(x.shape[:axis]), _product(x.shape[axis:]))


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@rule("Concat")
def concat(node: Node) -> Tensor:
    """Along one axis."""
    return torch.cat(node.tensors(), int(node.required("axis")))


@rule("Slice")
def cut(node: Node) -> Tensor:
    """From start to end along some axes; a negative step turns an axis round."""
    x = node.tensor(0)
    starts, ends, axes, steps = slice_bounds(node, x.dim())
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _cut(x, axis, start, end, step)
    return x


def _cut(x: Tensor, axis: int, start: Any, end: Any, step: Any) -> Tensor:
    if step > 0:
        size = x.shape[axis]
        start = 0 if not is_symbolic(start) and not is_symbolic(size) and start < -size else start
        part: Tensor = torch.ops.aten.slice.Tensor(x, axis, start, min(end, (1 << 63) - 1) if not is_symbolic(end) else end, step)
        return part
    size = x.shape[axis]
    whole = not is_symbolic(start) and not is_symbolic(end) and (start == -1 or start >= 1 << 30) and end <= -(1 << 30) and step == -1
    if whole:
        return x.flip(axis)
    if any(is_symbolic(item) for item in (size, start, end)):
        raise RefusalError("expected a negative step along an axis that does not vary, or over all of it, got another")
    places = list(range(int(size)))[slice(start, None if end < -size else end, step)]
    return x.index_select(axis, torch.tensor(places, dtype=torch.int64))


@rule("Split")
def split(node: Node) -> tuple[Tensor, ...]:
    """Parts of told sizes along one axis."""
    x = node.tensor(0)
    axis = node.integer("axis", 0) % x.dim()
    sizes = split_sizes(node, x.shape[axis])
    return torch.split(x, sizes, axis)


@rule("Tile")
def tile(node: Node) -> Tensor:
    """Repeated along each axis."""
    return node.tensor(0).repeat(node.elements(1, "the repeats"))


@rule("Expand")
def expand(node: Node) -> Tensor:
    """Broadcast with a shape, in both directions."""
    x, wanted = node.tensor(0), node.elements(1, "the shape")
    dims = max(x.dim(), len(wanted))
    mine: list[Any] = [1] * (dims - x.dim()) + list(x.shape)
    other: list[Any] = [1] * (dims - len(wanted)) + wanted
    sizes = [own if not is_symbolic(size) and size in (1, -1) else size for own, size in zip(mine, other, strict=True)]
    return x.expand(sizes)


@rule("ConstantOfShape")
def constant_of_shape(node: Node) -> Tensor:
    """One number everywhere."""
    value, dtype = fill_value(node)
    return torch.full(node.elements(0, "the shape"), value, dtype=dtype)


@rule("Range")
def arange(node: Node) -> Tensor:
    """Numbers from start below limit."""
    node.ignore("stash_type")
    start, limit, delta = (node.number(index, what) for index, what in enumerate(("start", "limit", "delta")))
    return torch.arange(start, limit, delta, dtype=node.numbers(0).dtype)


@rule("EyeLike")
def eye_like(node: Node) -> Tensor:
    """1 on a diagonal, 0 elsewhere."""
    x, offset = node.tensor(0), node.integer("k", 0)
    kind = node.attribute("dtype")
    rows, columns = (torch.arange(size) for size in x.shape)
    return (rows.unsqueeze(1) + offset == columns).to(x.dtype if kind is None else dtype_of(int(kind)))


@rule("Trilu")
def triangle(node: Node) -> Tensor:
    """The upper or the lower triangle."""
    x, offset = node.tensor(0), int(node.number(1, "the diagonal")) if node.has(1) else 0
    return torch.triu(x, offset) if node.flag("upper", True) else torch.tril(x, offset)


@rule("Cast")
def cast(node: Node) -> Any:
    """To another element type."""
    return converted(node, int(node.required("to")))


@rule("CastLike")
def cast_like(node: Node) -> Any:
    """To the element type of the other input."""
    return converted(node, node.kind(1))


def converted(node: Node, kind: int) -> Any:
    """The first input as another element type; 8-bit floats saturate unless told otherwise."""
    value, node.made = node.value(0), kind
    saturate = node.flag("saturate", True)
    if node.text("round_mode", "up") != "up":
        raise RefusalError(f"expected rounding up of shared exponents, got round_mode {node.text('round_mode', 'up')}")
    if isinstance(value, Held) and value.weight.kind == kind:
        return value
    x, dtype = node.tensor(0), dtype_of(kind)
    if kind == TensorProto.FLOAT4E2M1:
        raise RefusalError("expected a type that torch rounds to, got FLOAT4E2M1")
    if kind in LARGEST:
        return to_float8(x, kind, saturate)
    if kind in BITS:
        return _wrapped(x.to(torch.int32), *RANGES[kind]).to(dtype)
    if dtype in (torch.uint16, torch.uint32, torch.uint64) and x.dtype.is_floating_point:
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def _wrapped(x: Tensor, low: int, high: int) -> Tensor:
    """The low bits of integers."""
    return torch.bitwise_and(x - low, high - low) + low


def to_float8(x: Tensor, kind: int, saturate: bool) -> Tensor:
    """Rounded to an 8-bit float; without saturation what does not fit becomes infinite or NaN."""
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point:
        x = x.to(torch.float32)
    limit = LARGEST[kind]
    if saturate:
        return torch.clamp(x, -limit, limit).to(dtype_of(kind))
    if kind != TensorProto.FLOAT8E5M2:  # the others have no infinity, and torch saturates or not by version
        raise RefusalError(f"expected saturation, got a cast to {kind_name(kind)} without it")
    return x.to(dtype_of(kind))


@rule("Pad")
def pad(node: Node) -> Tensor:
    """By a constant, the edge, a reflection or a wrap; negative amounts cut off."""
    x, mode = node.tensor(0), node.text("mode", "constant")
    amounts = node.attribute("pads")
    amounts = list(amounts) if amounts is not None else node.elements(1, "the amounts")
    axes = [int(axis) % x.dim() for axis in node.elements(3, "axes")] if node.has(3) else list(range(x.dim()))
    before, after = amounts[: len(axes)], amounts[len(axes) :]
    value = _fill(node)
    if mode == "constant":
        pairs = {axis: (low, high) for axis, low, high in zip(axes, before, after, strict=True)}
        first = min((axis for axis, pair in pairs.items() if any(is_symbolic(item) or item for item in pair)), default=x.dim())
        flat = [amount for axis in reversed(range(first, x.dim())) for amount in pairs.get(axis, (0, 0))]
        return F.pad(x, flat, value=value) if flat else x
    for axis, low, high in zip(axes, before, after, strict=True):
        if is_symbolic(low) or is_symbolic(high) or low or high:
            x = x.index_select(axis, _places(x.shape[axis], low, high, mode))
    return x


def _fill(node: Node) -> Any:
    if node.attribute("value") is not None:
        return node.real("value", 0.0)
    return node.number(2, "the value to pad with") if node.has(2) else 0


def _places(size: Any, low: Any, high: Any, mode: str) -> Tensor:
    """Which element stands at each place of a padded axis."""
    places = torch.arange(-low, size + high)
    if mode == "edge":
        return torch.clamp(places, 0, size - 1)
    if mode == "wrap":
        return torch.remainder(places, size)
    if mode != "reflect":
        raise RefusalError(f"expected the mode constant, edge, reflect or wrap, got {mode}")
    period = 2 * (size - 1)
    if not is_symbolic(period) and period == 0:
        return torch.zeros_like(places)
    around = torch.remainder(places, period)
    return torch.minimum(around, period - around)


@rule("DepthToSpace")
def depth_to_space(node: Node) -> Tensor:
    """Blocks of channels as pixels, in either order."""
    x, block = node.tensor(0), int(node.required("blocksize"))
    if node.text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, block, block, channels // (block * block), height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // (block * block), height * block, width * block)


@rule("SpaceToDepth")
def space_to_depth(node: Node) -> Tensor:
    """Blocks of pixels as channels."""
    x, block = node.tensor(0), int(node.required("blocksize"))
    order = (0, 3, 5, 1, 2, 4) if node.text("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block).permute(order)
    return parts.reshape(batch, channels * block * block, height // block, width // block)
