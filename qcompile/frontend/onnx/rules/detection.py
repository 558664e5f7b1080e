"""What detectors bring: boxes, regions, filters whose taps move, and sizes that values decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError, is_symbolic


def _limit(node: Node, index: int, what: str) -> Any:
    """A number that is an input, or None if it is left out."""
    return node.number(index, what) if node.has(index) else None


@rule("NonMaxSuppression")
def non_max_suppression(node: Node) -> Tensor:
    """Image, class and number of the boxes that stay."""
    boxes, scores = node.tensor(0), node.tensor(1)
    most, overlap = _limit(node, 2, "max_output_boxes_per_class"), _limit(node, 3, "iou_threshold")
    least = _limit(node, 4, "score_threshold")
    suppressed: Tensor = torch.ops.qcompile.non_max_suppression(
        boxes, scores, int(most or 0), float(overlap or 0.0), None if least is None else float(least), node.flag("center_point_box")
    )
    return suppressed


_OFFSETS = {"half_pixel": 0.5, "output_half_pixel": 0.0}


@rule("RoiAlign")
def roi_align(node: Node) -> Tensor:
    """Regions of an image, sampled between its pixels."""
    x, rois, images = (node.tensor(index) for index in range(3))
    mode = node.text("mode", "avg")
    # Before opset 16 there was no choice.
    coordinates = node.text("coordinate_transformation_mode", "half_pixel" if node.opset >= 16 else "output_half_pixel")
    if mode not in ("avg", "max") or coordinates not in _OFFSETS:
        raise RefusalError(f"expected a mean or a maximum between pixels, got mode {mode!r} and {coordinates!r}")
    height, width = node.integer("output_height", 1), node.integer("output_width", 1)
    scale, samples = node.real("spatial_scale", 1.0), node.integer("sampling_ratio", 0)
    aligned: Tensor = torch.ops.qcompile.roi_align(x, rois, images, height, width, scale, samples, _OFFSETS[coordinates], mode == "max")
    return aligned


@rule("Compress")
def compress(node: Node) -> Tensor:
    """The entries of an axis, or of all elements, where a condition [n] holds; what lies beyond it goes."""
    x, places = node.tensor(0), torch.nonzero(node.tensor(1)).reshape(-1)
    axis = node.attribute("axis")
    return x.reshape(-1).index_select(0, places) if axis is None else x.index_select(int(axis) % x.dim(), places)


@rule("Unique")
def unique(node: Node) -> tuple[Tensor, ...]:
    """Distinct numbers, or parts of an axis: in order, or as they come first; where first, which each one is, and how often."""
    x, told = node.tensor(0), node.attribute("axis")
    axis = 0 if told is None else int(told) % x.dim()
    if told is None:
        values, inverse, counts = torch._unique2(x.reshape(-1), True, True, True)
    else:
        values, inverse, counts = torch.ops.aten.unique_dim(x, axis, True, True, True)
    count, total = counts.shape[0], inverse.shape[0]
    first = torch.full([count], total, dtype=torch.int64).scatter_reduce(0, inverse, torch.arange(total), "amin")
    if not node.flag("sorted", True):
        first, order = torch.sort(first)
        values, counts = values.index_select(axis, order), counts.index_select(0, order)
        inverse = torch.sort(order)[1].index_select(0, inverse)
    return values, first, inverse, counts


@rule("DeformConv")
def deformable(node: Node) -> Tensor:
    """A convolution whose taps are moved by offsets, sampled between pixels, and weighted by a mask (arXiv:1811.11168).

    x [N, C, H, W], filters [M, C/groups, kernel], offsets [N, 2·D·taps, rows, columns] (down, then right), mask [N, D·taps, rows, columns].
    """
    x, weight, offset = (node.tensor(index) for index in range(3))
    if x.dim() != 4:
        raise RefusalError(f"expected images [N, C, H, W], got {x.dim()} dimensions")
    kernel, parts = list(weight.shape[2:]), node.integer("offset_group", 1)
    node.ignore("kernel_shape")
    steps, spread = (node.integers(name) or [1, 1] for name in ("strides", "dilations"))
    before = (node.integers("pads") or [0] * 4)[:2]
    rows, columns = offset.shape[2:]
    moves = offset.reshape(-1, 2, rows, columns)  # one for each image, part and tap
    places = []
    for axis, size in enumerate((rows, columns)):
        tap = torch.arange(kernel[axis]) * spread[axis] - before[axis]
        tap = tap.repeat_interleave(kernel[1]) if axis == 0 else tap.repeat(kernel[0])
        base = tap.reshape(-1, 1, 1) + (torch.arange(size) * steps[axis]).reshape([-1, 1] if axis == 0 else [1, -1])
        places.append(moves[:, axis].reshape(x.shape[0], parts, -1, rows, columns) + base)
    split = x.reshape(x.shape[0], parts, x.shape[1] // parts, x.shape[2], x.shape[3])
    found = _between(split, *places)
    if node.has(4):
        found = found * node.tensor(4).reshape(x.shape[0], parts, 1, -1, rows, columns)
    groups = node.integer("group", 1)
    found = found.reshape(x.shape[0], groups, -1, rows * columns)
    result = torch.matmul(weight.reshape(groups, weight.shape[0] // groups, -1), found).reshape(x.shape[0], -1, rows, columns)
    bias = node.optional(3)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


def _between(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """X [N, D, C, H, W] between pixels, at places [N, D, taps, rows, columns]: [N, D, C, taps, rows, columns]; 0 outside."""
    height, width = x.shape[3:]
    flat = x.flatten(3)
    parts = []
    for low, high in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = torch.floor(down) + low, torch.floor(right) + high
        share = (1 - (down - row).abs()) * (1 - (right - column).abs())
        share = torch.where((row >= 0) & (row < height) & (column >= 0) & (column < width), share, 0.0)
        pixel = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).to(torch.int64)
        picked = torch.gather(flat, 3, pixel.flatten(2).unsqueeze(2).expand(-1, -1, x.shape[2], -1))
        parts.append(picked.reshape(*picked.shape[:3], *down.shape[2:]) * share.unsqueeze(2))
    return sum(parts[1:], parts[0])


@rule("CenterCropPad")
def centred(node: Node) -> Tensor:
    """Cut, or filled with zeros, to sizes about the middle."""
    x, wanted = node.tensor(0), node.elements(1, "the shape")
    for axis, size in zip(node.integers("axes") or range(x.dim()), wanted, strict=True):
        found = x.shape[axis]
        if is_symbolic(found) or is_symbolic(size):
            raise RefusalError(f"expected a size of axis {axis} that does not vary, got one that does")
        if size < found:
            x = x.narrow(axis, (found - size) // 2, size)
        elif size > found:
            before = (size - found) // 2
            x = F.pad(x, [0, 0] * (x.dim() - 1 - axis % x.dim()) + [before, size - found - before])
    return x
