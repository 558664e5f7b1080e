"""From a weight divided by its scale to the nearest level of an element type, to its code, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.quant.element import ElementType


def snap(x: Tensor, element: ElementType, zero: Tensor | None = None) -> Tensor:
    """The level nearest to each of `x`, itself a float of x's dtype; what lies outside goes to the end of the range.

    `zero` (integers, broadcastable to x) shifts the range of an integer element: -zero … levels - 1 - zero.
    """
    if element.is_integer:
        if zero is None:
            return x.round().clamp_(element.low, element.high)
        return torch.minimum(torch.maximum(x.round(), -zero), element.levels - 1 - zero)
    if element.values is None:
        return x.clamp(-element.largest, element.largest).to(torch.float8_e4m3fn).to(x.dtype)
    levels, _ = _ascending(element, x)
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def encode(values: Tensor, element: ElementType, zero: Tensor | None = None) -> Tensor:
    """Codes uint8 of levels that `snap` returned."""
    if element.is_integer:
        return (values + (float(-element.low) if zero is None else zero)).to(torch.uint8)
    if element.values is None:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    levels, order = _ascending(element, values)
    return order[torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def decode(codes: Tensor, element: ElementType, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The levels that `codes` stand for, as `dtype`; `zero` is broadcastable to them."""
    if element.is_integer:
        return codes.to(dtype) - (float(-element.low) if zero is None else zero)
    if element.values is None:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    return torch.tensor(element.values, dtype=dtype, device=codes.device)[codes.int()]


def _ascending(element: ElementType, like: Tensor) -> tuple[Tensor, Tensor]:
    """Different levels in ascending order, and the code of each (of the two zeros of fp4 the positive one)."""
    assert element.values is not None
    codes = sorted({value + 0.0: code for code, value in reversed(list(enumerate(element.values)))}.items())
    levels = torch.tensor([value for value, _ in codes], dtype=like.dtype, device=like.device)
    return levels, torch.tensor([code for _, code in codes], dtype=torch.uint8, device=like.device)
