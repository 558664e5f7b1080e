"""What detectors end with: boxes, regions, and places that values decide."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument
from qcompile.exporters.onnx.rules.table import rule


@rule("qcompile.non_max_suppression.default")
def non_max_suppression(e: Emitter, node: Call) -> Value:
    """Image, class and number of the boxes that stay."""
    boxes, scores, most, overlap = node.args[:4]
    least = argument(node, 4, "least")
    return e.op(
        "NonMaxSuppression", e.value(boxes, torch.float32), e.value(scores, torch.float32), e.ints([most]),
        e.constant([overlap], torch.float32), None if least is None else e.constant([least], torch.float32),
        center_point_box=int(argument(node, 5, "centred", False)),
    )  # fmt: skip


@rule("qcompile.roi_align.default")
def roi_align(e: Emitter, node: Call) -> Value:
    """Regions of an image, sampled between its pixels."""
    x, rois, images, height, width = node.args[:5]
    offset = argument(node, 7, "offset", 0.5)
    options: dict[str, Any] = {
        "output_height": height, "output_width": width, "spatial_scale": float(argument(node, 5, "scale", 1.0)),
        "sampling_ratio": argument(node, 6, "samples", 0), "mode": "max" if argument(node, 8, "largest", False) else "avg",
        "coordinate_transformation_mode": "half_pixel" if offset else "output_half_pixel",
    }  # fmt: skip
    return e.op("RoiAlign", e.value(x), e.value(rois, e.dtype(x)), e.value(images, torch.int64), **options)


@rule("aten.nonzero.default")
def nonzero(e: Emitter, node: Call) -> Value:
    """Places of what is not 0: [count, dimensions]."""
    return e.op("Transpose", e.op("NonZero", e.value(node.args[0])), perm=[1, 0])


@rule("aten._unique2.default", "aten.unique_dim.default")
def unique(e: Emitter, node: Call) -> tuple[Value, ...]:
    """Distinct numbers, or parts of an axis, in order; which each one is, and how often."""
    x = node.args[0]
    axis = int(node.args[1]) if "dim" in str(node.target) else None
    if axis is None and len(e.shape(x)) != 1:
        raise e.refusal("expected numbers in one dimension")
    values, _, inverse, counts = e.ops("Unique", e.value(x), count=4, axis=axis, sorted=1)
    return values, inverse, counts
