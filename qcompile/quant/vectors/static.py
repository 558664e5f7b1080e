"""Integers with one calibrated scale per channel: nothing is stored beside the codes (`kv8-static`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.quant.element import ElementType, element
from qcompile.quant.packing import pack, packed_bytes, unpack

_PATTERN = re.compile(r"(int[2-8]) static")


@dataclass(frozen=True)
class StaticFormat:
    """Vectors [D] as D signed codes, low bits first; the scale of a channel is its largest calibrated magnitude over the largest code.

    What is larger than anything seen in calibration is clipped. Table `scale`: float16 [L, D].
    """

    element: ElementType
    tokens: ClassVar[int] = 1
    tables: ClassVar[tuple[str, ...]] = ("scale",)

    def __str__(self) -> str:
        return f"{self.element.name} static"

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers."""
        return packed_bytes(size, self.element.bits)

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The scales [L, D] for vectors like x [N, L, D]; every channel holds its own extremes, whatever counts more."""
        del importance
        scale = x.abs().amax(0).float() / self.element.high
        return (scale.clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16),)

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., L, T, D] to uint8 [..., L, T, W]."""
        low, high = self.element.low, self.element.high
        codes = (x.float() / tables[0].float().unsqueeze(-2)).round_().clamp_(low, high).sub_(low).to(torch.uint8)
        return pack(codes.reshape(-1, x.shape[-1]), self.element.bits).view(*x.shape[:-1], -1)

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Uint8 [..., L, T, W] to [..., L, T, D] as `dtype`."""
        codes = unpack(packed.reshape(-1, packed.shape[-1]), self.element.bits, size).to(torch.float32) + self.element.low
        return (codes.view(*packed.shape[:-1], size) * tables[0].float().unsqueeze(-2)).to(dtype)


def read_static(text: str) -> StaticFormat | None:
    """`int8 static`, or None for anything else."""
    match = _PATTERN.fullmatch(text)
    return StaticFormat(element(match[1])) if match else None
