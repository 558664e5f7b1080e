"""Operators of detectors: what is found is cut out, and what was found twice is dropped. References as the ONNX standard defines them.

N images, C channels or classes, B boxes, R regions, H and W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.ops import define, working_dtype


def _fake_suppressed(boxes: Tensor, *_: object, **__: object) -> Tensor:
    rows = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((rows, 3), dtype=torch.int64)


@define(
    "non_max_suppression(Tensor boxes, Tensor scores, int most, float overlap, float? least=None, bool centred=False) -> Tensor",
    _fake_suppressed,
)
def non_max_suppression(
    boxes: Tensor, scores: Tensor, most: int, overlap: float, least: float | None = None, centred: bool = False
) -> Tensor:
    """The boxes that stay: int64 [n, 3] of image, class and box, as many as the values leave.

    Of each image and class the best box is taken, those that overlap it by more than `overlap` (intersection over union) are dropped,
    and so on, `most` times or until none is left; equal scores in the order of the boxes.

    Args:
        boxes: [N, B, 4]: two corners (y, x, y, x), or middle and size (x, y, width, height) where they are `centred`.
        scores: [N, C, B]; boxes whose score is not above `least` are never taken.
        most: boxes of an image and class at most.
        overlap: from 0 to 1.
        least: None takes boxes of any score.
        centred: how boxes are written.
    """
    found = [
        torch.tensor([[image, kind, box]])
        for image in range(scores.shape[0])
        for kind in range(scores.shape[1])
        for box in _kept(_corners(boxes[image].to(working_dtype(boxes.dtype)), centred), scores[image, kind], most, overlap, least)
    ]
    return torch.cat(found).to(boxes.device) if found else torch.empty(0, 3, dtype=torch.int64, device=boxes.device)


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """[B, 4]: the lesser corner, then the greater one."""
    if centred:
        middle, half = boxes[:, :2], boxes[:, 2:] / 2
        return torch.cat((middle - half, middle + half), dim=1)
    first, second = boxes[:, :2], boxes[:, 2:]
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), dim=1)


def _kept(corners: Tensor, scores: Tensor, most: int, overlap: float, least: float | None) -> list[int]:
    """Numbers of the boxes that stay, the best first."""
    order = torch.argsort(scores, descending=True, stable=True)
    if least is not None:
        order = order[scores[order] > least]
    kept: list[int] = []
    while order.numel() and len(kept) < most:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        order = rest[_overlap(corners[best], corners[rest]) <= overlap]
    return kept


def _overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box [4] and others [n, 4]; 0 where either is empty."""
    sides = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])
    common = sides.clamp(min=0).prod(1)
    area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(1)
    union = area + areas - common
    real = (common > 0) & (area > 0) & (areas > 0) & (union > 0)
    return torch.where(real, common / torch.where(real, union, 1), 0)


def _fake_roi_align(x: Tensor, rois: Tensor, images: Tensor, height: int, width: int, *_: object, **__: object) -> Tensor:
    return x.new_empty((rois.shape[0], x.shape[1], height, width))


@define(
    "roi_align(Tensor x, Tensor rois, Tensor images, int height, int width, float scale=1.0, int samples=0, float offset=0.5, "
    "bool largest=False) -> Tensor",
    _fake_roi_align,
)
def roi_align(
    x: Tensor, rois: Tensor, images: Tensor, height: int, width: int, scale: float = 1.0, samples: int = 0, offset: float = 0.5,
    largest: bool = False,
) -> Tensor:  # fmt: skip
    """Regions of images [R, C, height, width], sampled between pixels (Mask R-CNN, arXiv:1703.06870).

    Args:
        x: [N, C, H, W].
        rois: [R, 4]: two corners (x, y, x, y), which `scale` takes to pixels of x.
        images: [R], the image that a region lies in.
        height: of a result.
        width: of a result.
        scale: pixels of x for one unit of a region.
        samples: points along each side of a result's pixel; 0 takes as many as it has pixels of x.
        offset: taken from the corners; 0 also makes each region at least one pixel wide and high.
        largest: the largest of the four weighted neighbours of all points, which is what the standard's `max` is, not their mean.
    """
    work = working_dtype(x.dtype)
    corners = rois.to(work) * scale - offset
    found = [
        _sampled(x[int(image)].to(work), corners[index], (height, width), samples, not offset, largest)
        for index, image in enumerate(images.tolist())
    ]
    return torch.stack(found).to(x.dtype) if found else x.new_empty((0, x.shape[1], height, width))


def _sampled(x: Tensor, corners: Tensor, sizes: tuple[int, int], samples: int, whole: bool, largest: bool) -> Tensor:
    """One region of x [C, H, W]."""
    places = [
        _points(corners[1 - axis], corners[3 - axis], sizes[axis], samples, whole, x.shape[1 + axis]) for axis in range(2)
    ]  # rows, then columns
    (low_y, high_y, part_y, inside_y), (low_x, high_x, part_x, inside_x) = places
    if not low_y.numel() or not low_x.numel():
        return x.new_zeros(x.shape[0], *sizes)
    inside = inside_y.unsqueeze(1) & inside_x
    weighted = [
        x[:, rows][:, :, columns] * torch.where(inside, share_y.unsqueeze(1) * share_x, 0)
        for rows, share_y in ((low_y, 1 - part_y), (high_y, part_y))
        for columns, share_x in ((low_x, 1 - part_x), (high_x, part_x))
    ]
    # [C, height, points of a row, width, points of a column]
    shape = (x.shape[0], sizes[0], len(low_y) // sizes[0], sizes[1], len(low_x) // sizes[1])
    if largest:
        return torch.stack(weighted).amax(0).view(shape).amax((2, 4))
    return sum(weighted[1:], weighted[0]).view(shape).mean((2, 4))


def _points(start: Tensor, end: Tensor, size: int, samples: int, whole: bool, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis: the pixels before and after each point, the share of the latter, and whether the point lies inside."""
    length = end - start
    length = length.clamp(min=1) if whole else length
    step = length / size
    count = samples if samples > 0 else max(0, int(torch.ceil(step)))
    bins = torch.arange(size, dtype=start.dtype, device=start.device).unsqueeze(1)
    inner = torch.arange(count, dtype=start.dtype, device=start.device) + 0.5
    point = (start + bins * step + inner * step / max(count, 1)).flatten()
    inside = (point >= -1) & (point <= pixels)
    point = torch.where(inside, point, 0).clamp(0, pixels - 1)
    low = point.long()
    high = (low + 1).clamp(max=pixels - 1)
    return low, high, point - low, inside
