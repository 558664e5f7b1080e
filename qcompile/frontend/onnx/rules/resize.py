"""Resizing and sampling: torch's own interpolation where it is the same, else an exact matrix per axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError, is_symbolic


@dataclass(frozen=True)
class Sampling:
    """How an output coordinate becomes an input coordinate, and how values there are made."""

    mode: str
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One resized axis: sizes before and after, the scale, and the part of it that is looked at (0 to 1: all)."""

    size: Any
    wanted: Any
    scale: Any
    start: float = 0.0
    end: float = 1.0


@rule("Upsample")
def upsample(node: Node) -> Tensor:
    """Opset 7 to 9: by scales, the first of each block, or linear between them."""
    x = node.tensor(0)
    scales = node.attribute("scales")
    scales = list(scales) if scales is not None else node.elements(1, "the scales")
    axes = {axis: Axis(size, _scaled(size, scale), scale) for axis, (size, scale) in enumerate(zip(x.shape, scales, strict=True))}
    return _resized(x, axes, Sampling(node.text("mode", "nearest"), "asymmetric", "floor"))


@rule("Resize")
def resize(node: Node) -> Tensor:
    """By scales or to sizes, in every mode of every version."""
    x = node.tensor(0)
    mode = node.text("mode", "nearest")
    if node.opset < 11:
        scales = node.elements(1, "the scales")
        axes = {axis: Axis(size, _scaled(size, scale), scale) for axis, (size, scale) in enumerate(zip(x.shape, scales, strict=True))}
        return _resized(x, axes, Sampling(mode, "asymmetric", "floor"))
    sampling = Sampling(
        mode, node.text("coordinate_transformation_mode", "half_pixel"), node.text("nearest_mode", "round_prefer_floor"),
        node.real("cubic_coeff_a", -0.75), node.flag("exclude_outside"), node.flag("antialias"), node.real("extrapolation_value", 0.0),
    )  # fmt: skip
    return _resized(x, _axes(node, x, sampling), sampling)


def _scaled(size: Any, scale: Any) -> Any:
    if is_symbolic(size) or is_symbolic(scale):
        if not is_symbolic(scale) and float(scale).is_integer():
            return size * int(scale)
        raise RefusalError(f"expected a whole scale along an axis that varies, got {scale}")
    return math.floor(size * scale)


def _axes(node: Node, x: Tensor, sampling: Sampling) -> dict[int, Axis]:
    told = node.integers("axes")
    axes = [axis % x.dim() for axis in (range(x.dim()) if told is None else told)]
    roi = node.elements(1, "the region") if node.has(1) and sampling.coordinates == "tf_crop_and_resize" else []
    roi = roi or [0.0] * len(axes) + [1.0] * len(axes)
    scales = node.elements(2, "the scales") if node.has(2) else []
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    if scales:
        wanted: list[Any] = [_scaled(x.shape[axis], scale) for axis, scale in zip(axes, scales, strict=True)]
    else:
        wanted = node.elements(3, "the sizes")
        scales = [_ratio(size, x.shape[axis]) for axis, size in zip(axes, wanted, strict=True)]
        if policy != "stretch":
            scale = min(scales) if policy == "not_larger" else max(scales)
            scales = [scale] * len(axes)
            wanted = [math.floor(x.shape[axis] * scale + 0.5) for axis in axes]
    starts, ends = roi[: len(axes)], roi[len(axes) :]
    return {
        axis: Axis(x.shape[axis], *parts) for axis, *parts in zip(axes, wanted, scales, starts, ends, strict=True)
    }  # fmt: skip


def _ratio(wanted: Any, size: Any) -> Any:
    if not is_symbolic(wanted) and not is_symbolic(size):
        return wanted / size
    if str(wanted) == str(size):
        return 1.0
    factor = next((factor for factor in range(2, 17) if str(wanted) == str(size * factor)), None)
    return float(factor) if factor else wanted / size


def _resized(x: Tensor, axes: dict[int, Axis], sampling: Sampling) -> Tensor:
    changed = {
        axis: part for axis, part in axes.items()
        if is_symbolic(part.scale) or part.scale != 1 or str(part.size) != str(part.wanted) or (part.start, part.end) != (0.0, 1.0)
    }  # fmt: skip
    if sampling.coordinates == "tf_crop_and_resize":
        changed = axes
    if not changed:
        return x
    torch_mode = _torch_mode(x, changed, sampling)
    if torch_mode is not None:
        sizes = [changed[axis].wanted if axis in changed else x.shape[axis] for axis in (2, 3)]
        align = sampling.coordinates == "align_corners" if torch_mode == "bilinear" else None
        return F.interpolate(x, size=sizes, mode=torch_mode, align_corners=align)
    for axis, part in changed.items():
        if any(is_symbolic(item) for item in (part.size, part.wanted, part.scale)):
            raise RefusalError(
                f"expected a size along axis {axis} that does not vary, got {part.size} -> {part.wanted} in mode {sampling.mode}"
            )
        x = _along(x, axis, part, sampling)
    return x


def _torch_mode(x: Tensor, changed: dict[int, Axis], sampling: Sampling) -> str | None:
    """`nearest` or `bilinear`, where torch's interpolation of images is the same function; else None."""
    if x.dim() != 4 or not set(changed) <= {2, 3} or sampling.antialias or sampling.exclude_outside or not x.dtype.is_floating_point:
        return None
    parts = changed.values()
    if sampling.mode == "nearest":
        return "nearest" if all(_is_floor(part, sampling) for part in parts) else None
    if sampling.mode != "linear" or sampling.coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    exact = all(_is_symbolic_whole(part) or (not _varies(part) and part.size * part.scale == part.wanted > 1) for part in parts)
    return "bilinear" if exact else None


def _varies(part: Axis) -> bool:
    return any(is_symbolic(item) for item in (part.size, part.wanted, part.scale))


def _is_symbolic_whole(part: Axis) -> bool:
    return _varies(part) and not is_symbolic(part.scale) and float(part.scale).is_integer() and part.scale >= 1


def _is_floor(part: Axis, sampling: Sampling) -> bool:
    """Whether each output takes input floor(i · size / wanted)."""
    if _varies(part):
        pairs = (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil"))
        return _is_symbolic_whole(part) and (sampling.coordinates, sampling.nearest) in pairs
    if sampling.coordinates == "tf_crop_and_resize":
        return False
    chosen = [_nearest(place, sampling.nearest) for place in _places(part, sampling)]
    return [min(max(place, 0), part.size - 1) for place in chosen] == [i * part.size // part.wanted for i in range(part.wanted)]


def _places(part: Axis, sampling: Sampling) -> list[float]:
    """The input coordinate of each output coordinate."""
    how, scale, size, wanted = sampling.coordinates, part.scale, part.size, part.wanted
    real = size * scale  # the output's size before it was cut to an integer
    if how == "half_pixel":
        return [(i + 0.5) / scale - 0.5 for i in range(wanted)]
    if how == "pytorch_half_pixel":
        return [(i + 0.5) / scale - 0.5 if real > 1 else 0.0 for i in range(wanted)]
    if how == "align_corners":
        return [i * (size - 1) / (real - 1) if real != 1 else 0.0 for i in range(wanted)]
    if how == "asymmetric":
        return [i / scale for i in range(wanted)]
    if how == "tf_half_pixel_for_nn":
        return [(i + 0.5) / scale for i in range(wanted)]
    if how == "half_pixel_symmetric":
        offset = size / 2 * (1 - wanted / real)
        return [offset + (i + 0.5) / scale - 0.5 for i in range(wanted)]
    if how == "tf_crop_and_resize":
        first, last = part.start * (size - 1), part.end * (size - 1)
        return [first + i * (last - first) / (wanted - 1) if wanted > 1 else 0.5 * (first + last) for i in range(wanted)]
    raise RefusalError(f"expected a coordinate_transformation_mode of the standard, got {how}")


def _nearest(place: float, how: str) -> int:
    if how == "round_prefer_floor":
        return math.ceil(place - 0.5)
    if how == "round_prefer_ceil":
        return math.floor(place + 0.5)
    if how not in ("floor", "ceil"):
        raise RefusalError(f"expected a nearest_mode of the standard, got {how}")
    return math.floor(place) if how == "floor" else math.ceil(place)


def _along(x: Tensor, axis: int, part: Axis, sampling: Sampling) -> Tensor:
    places = _places(part, sampling)
    if sampling.mode == "nearest":
        chosen = [min(max(_nearest(place, sampling.nearest), 0), part.size - 1) for place in places]
        result = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    else:
        matrix = torch.tensor([_row(place, part, sampling) for place in places], dtype=torch.float64).to(x.dtype)
        result = torch.matmul(x.transpose(axis, -1), matrix.t()).transpose(axis, -1)
    outside = [sampling.coordinates == "tf_crop_and_resize" and not 0 <= place <= part.size - 1 for place in places]
    if not any(outside):
        return result
    shape = [1] * x.dim()
    shape[axis] = -1
    return torch.where(torch.tensor(outside).reshape(shape), sampling.extrapolation, result)


def _row(place: float, part: Axis, sampling: Sampling) -> list[float]:
    """What each input contributes to the output at one place."""
    reach = {"linear": 1, "cubic": 2}.get(sampling.mode)
    if reach is None:
        raise RefusalError(f"expected the mode nearest, linear or cubic, got {sampling.mode}")
    shrink = min(part.scale, 1.0) if sampling.antialias else 1.0
    reach = math.ceil(reach / shrink)
    low = math.floor(place)
    taps = range(low - reach + 1, low + reach + 1)
    kernel = _linear if sampling.mode == "linear" else lambda distance: _cubic(distance, sampling.cubic)
    weights = [kernel((tap - place) * shrink) for tap in taps]
    if sampling.exclude_outside:
        weights = [weight if 0 <= tap < part.size else 0.0 for tap, weight in zip(taps, weights, strict=True)]
    total = sum(weights) if sampling.exclude_outside or sampling.antialias else 1.0
    row = [0.0] * part.size
    for tap, weight in zip(taps, weights, strict=True):
        row[min(max(tap, 0), part.size - 1)] += weight / total
    return row


def _linear(distance: float) -> float:
    return max(0.0, 1 - abs(distance))


def _cubic(distance: float, a: float) -> float:
    """Keys' kernel (1981) with the parameter a."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@rule("GridSample")
def grid_sample(node: Node) -> Tensor:
    """Values at places that a grid tells, between -1 and 1."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.text("mode", "linear"), node.text("mode", "linear"))
    return F.grid_sample(
        node.tensor(0), node.tensor(1), mode=mode, padding_mode=node.text("padding_mode", "zeros"), align_corners=node.flag("align_corners")
    )
