"""What the filters of a convolution are multiplied with: the patches of its input that a window moves over, and their moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from qcompile.ir.graph import fake_value
from qcompile.passes.activation_pairs import arguments
from qcompile.passes.stream import NodeInputs

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
_ELEMENTS = 1 << 24
"""Of the patches that are held at once."""
_PLACES = 1024
"""Of one image that count, about: neighbours of a large map say the same."""


@dataclass(frozen=True)
class Moments:
    """Of the patches that each group of filters sees: mean [G, K] and second moment [G, K, K], float32."""

    mean: Tensor
    second: Tensor

    def covariance(self) -> Tensor:
        """The second moment around the mean [G, K, K]: what is left of an error once its mean is made up for."""
        return self.second - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


def patch_moments(node: fx.Node, inputs: NodeInputs) -> Moments:
    """The moments over all calibration inputs of a convolution, on a lattice of places, zeros around the edges included."""
    mean, second, count = torch.zeros(()), torch.zeros(()), 0
    for batch in range(len(inputs)):
        x = inputs[batch][0].to(torch.float32)
        for part in x.split(_images_at_once(node, x)):
            seen = patches(node, part, _PLACES)
            mean = mean + seen.sum(1, dtype=torch.float64)
            second = second + torch.bmm(seen.transpose(1, 2), seen).double()
            count += seen.shape[1]
    return Moments((mean / max(count, 1)).float(), (second / max(count, 1)).float())


def patch_mean(node: fx.Node, inputs: NodeInputs) -> Tensor:
    """The mean alone, [G, K]."""
    mean, count = torch.zeros(()), 0
    for batch in range(len(inputs)):
        x = inputs[batch][0].to(torch.float32)
        for part in x.split(_images_at_once(node, x)):
            seen = patches(node, part, _PLACES)
            mean, count = mean + seen.sum(1, dtype=torch.float64), count + seen.shape[1]
    return (mean / max(count, 1)).float()


def patches(node: fx.Node, x: Tensor, most: int = 0) -> Tensor:
    """The patches [G, B·H'·W', K] of an input [B, C, H, W] (or [B, C, W]), each as a row of the flattened filters is multiplied with it.

    With `most`, those on an even lattice of about so many places of each image at most.
    """
    size, stride, padding, dilation, groups = _window(node)
    x = functional.pad(x, [side for width in reversed(padding) for side in (width, width)])
    for axis, (taps, step, spread) in enumerate(zip(size, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, spread * (taps - 1) + 1, step)[..., ::spread]
    dims = len(size)
    apart = math.ceil((torch.Size(x.shape[2 : 2 + dims]).numel() / most) ** (1 / dims)) if most else 1
    lattice = [slice(min(apart // 2, length - 1), None, apart) for length in x.shape[2 : 2 + dims]]
    x = x[(slice(None), slice(None), *lattice)]
    batch, channels, *rest = x.shape
    places = torch.Size(rest[:dims]).numel()
    x = x.reshape(batch, groups, channels // groups, *rest)
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return x.permute(order).reshape(groups, batch * places, -1)


def _window(node: fx.Node) -> tuple[list[int], list[int], list[int], list[int], int]:
    """Taps, stride, padding and dilation along each axis, and the number of groups."""
    options = arguments(node)
    size = [int(taps) for taps in fake_value(options["weight"]).shape[2:]]
    stride, padding, dilation = (_along(options[name], len(size)) for name in ("stride", "padding", "dilation"))
    return size, stride, padding, dilation, int(options["groups"])


def _along(numbers: Sequence[int], dims: int) -> list[int]:
    """One number per axis."""
    return [int(number) for number in (list(numbers) * dims if len(numbers) == 1 else numbers)]


def _images_at_once(node: fx.Node, x: Tensor) -> int:
    size, stride, *_ = _window(node)
    one = x[0].numel() * torch.Size(size).numel() // max(1, torch.Size(stride).numel())
    return max(1, _ELEMENTS // max(1, one))
