"""How a matrix is quantized: element type, granularity, zero point or not, and how its scales are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.errors import FormatError
from qcompile.quant.element import FP4, INT8, ElementType, element
from qcompile.quant.granularity import PER_CHANNEL, Granularity

SCALE_TYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}  # fmt: skip
"""What a scale can be stored as: a float; or in 8 bits, as a power of two (e8m0) or with a second level of scales above it."""


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is quantized: element type, granularity, zero point or not, and the type of its scales.

    An int8 scale is multiplied by a float16 of its row, or of each run of `super_group` groups; an e4m3 scale by one float32 of the matrix;
    an e8m0 scale is a power of two. `minimum` stores the value of code 0 of each group as a float of the scale's type in place of a zero
    point: `code · scale + minimum`, as GGUF's Q4_1 and Q5_1 do. Raises FormatError for combinations that do not exist.
    """

    element: ElementType
    granularity: Granularity = PER_CHANNEL
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16
    super_group: int = -1
    minimum: bool = False

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_TYPES.values():
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SCALE_TYPES.values())
            raise FormatError(f"scale_dtype={self.scale_dtype}: expected one of {names}")
        if self.super_group != -1 and (self.scale_dtype != torch.int8 or self.super_group < 2):
            raise FormatError(f"super_group={self.super_group}: expected at least 2, for int8 scales; or -1, one second scale per row")
        if not (self.symmetric or self.element.is_integer):
            raise FormatError(f"{self.element.name}: expected symmetric=True, a table of numbers has no zero point; choose an integer type")
        if self.minimum:
            self._require_minimum()
        if self.scale_dtype == torch.float8_e8m0fnu:
            self._require("MX", 32, self.element.name in ("fp4", "fp8", "int8") and self.symmetric, "fp4, fp8 or symmetric int8")
        if self.scale_dtype == torch.float8_e4m3fn and self.element.name == "fp4":
            self._require("NVFP4", 16)

    def _require(self, family: str, size: int, fits: bool = True, wanted: str = "") -> None:
        if self.granularity.group_size != size:
            raise FormatError(f"group_size={self.granularity.group_size}: {family} wants groups of {size}; leave group_size out")
        if not fits:
            raise FormatError(f"{self.element.name}: {family} scales (e8m0) want {wanted}; choose another scale_dtype")

    def _require_minimum(self) -> None:
        if self.symmetric or not self.element.is_integer:
            raise FormatError(f"{self.element.name} with minima: expected symmetric=False and an integer type; leave minimum out")
        if self.scale_dtype.itemsize == 1:
            raise FormatError("scales of 8 bits with minima: expected scales of fp16, bf16 or fp32, which minima are stored as too")

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that a weight of this format is stored as."""
        zero = () if self.symmetric else ("zero",)
        return ("codes", "scale", *zero, *(("scale2",) if self.second_level else ()))

    @property
    def second_level(self) -> bool:
        """Whether scales have a scale."""
        return self.scale_dtype in (torch.int8, torch.float8_e4m3fn)

    def second_scales(self, groups: int) -> int:
        """Second scales of a row with `groups` groups, for int8 scales."""
        return 1 if self.super_group == -1 else -(-groups // self.super_group)

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "min" if self.minimum else "asym"
        scale = next(name for name, dtype in SCALE_TYPES.items() if dtype == self.scale_dtype)
        return f"{self.element.name} {self.granularity} {kind} {scale}{'' if self.super_group == -1 else f'/{self.super_group}'}"


def parse_format(text: str) -> QuantFormat:
    """Read what `str(QuantFormat)` writes: `int4 g64 sym fp16`, `int4 g32 sym int8/8`, `int4 g32 min fp16`.

    Raises:
        FormatError: for text of another shape, or a format that does not exist.
    """
    name, size, kind, scale, *rest = (*text.split(), "", "", "", "")[: max(4, len(text.split()))]
    stored, _, super_group = scale.partition("/")
    numbers = size == "channel" or (size[:1] == "g" and size[1:].isdecimal()), super_group.isdecimal() or not super_group
    if rest or kind not in ("sym", "asym", "min") or stored not in SCALE_TYPES or not all(numbers):
        raise FormatError(f"expected a format like 'int4 g64 sym fp16', got {text!r}")
    granularity = Granularity(-1 if size == "channel" else int(size[1:]))
    return QuantFormat(element(name), granularity, kind == "sym", SCALE_TYPES[stored], int(super_group or -1), kind == "min")


MXFP4 = QuantFormat(FP4, Granularity(32), scale_dtype=torch.float8_e8m0fnu)
"""OCP Microscaling Formats 1.0: e2m1 in groups of 32 that share a power of two."""
MXINT8 = QuantFormat(INT8, Granularity(32), scale_dtype=torch.float8_e8m0fnu)
"""The same with int8. Scales are those of the integers -128..127: the 2^-6 that the standard implies is in the exponent."""
NVFP4 = QuantFormat(FP4, Granularity(16), scale_dtype=torch.float8_e4m3fn)
"""e2m1 in groups of 16 with an e4m3 scale, and one float32 per matrix."""
