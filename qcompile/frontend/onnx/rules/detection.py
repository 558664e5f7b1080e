"""What detectors end with: boxes, regions, and places that values decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError


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
