"""How activations are quantized in front of the matmuls that read them."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import FormatError
from qcompile.quant.element import INT8, ElementType
from qcompile.quant.granularity import PER_CHANNEL, Granularity


@dataclass(frozen=True)
class ActivationFormat:
    """Element type and who shares a scale: by default each token has its own, taken from the token when it comes (dynamic).

    Attributes:
        element: int2 … int8, or fp8.
        granularity: input columns of a token that share a scale, stored as float16; -1 is the whole token, and float32.
        symmetric: no zero point.
        static: one scale for the whole tensor, measured on calibration data and stored in the model.
        clip: share of the range that is kept; what is beyond saturates.

    Raises FormatError for combinations that do not exist.
    """

    element: ElementType = INT8
    granularity: Granularity = PER_CHANNEL
    symmetric: bool = True
    static: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        name = self.element.name
        if not (self.element.is_integer or name == "fp8"):
            raise FormatError(f"activations in {name}: expected int2 … int8 or fp8")
        if not (self.symmetric or self.element.is_integer):
            raise FormatError(f"activations in {name}: expected symmetric=True, floats have no zero point; choose an integer type")
        if self.static and self.granularity != PER_CHANNEL:
            raise FormatError(f"static activations in {self.granularity}: expected one scale for the tensor; set activation_group_size=-1")
        if not 0 < self.clip <= 1:
            raise FormatError(f"clip={self.clip}: expected a share of the range above 0 and at most 1")

    def __str__(self) -> str:
        size = self.granularity.group_size
        shared = "tensor" if self.static else "token" if size == -1 else f"g{size}"
        clip = "" if self.clip == 1 else f" clip {self.clip:g}"
        return f"{self.element.name} {shared} {'sym' if self.symmetric else 'asym'} {'static' if self.static else 'dynamic'}{clip}"
