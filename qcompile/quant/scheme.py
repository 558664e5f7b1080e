"""Formats of weights and caches, and the schemes that combine them; presets are module constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch

from qcompile.errors import FormatError, TargetError
from qcompile.quant.activation_format import ActivationFormat as ActivationFormat
from qcompile.quant.cache_format import PLAIN, CacheFormat
from qcompile.quant.element import FP8, INT4, INT8, NF4, element
from qcompile.quant.format import MXFP4, MXINT8, NVFP4, parse_format
from qcompile.quant.format import QuantFormat as QuantFormat
from qcompile.quant.granularity import Granularity
from qcompile.quant.scheme_options import SchemeOptions, given_options

MATMULS = ("exact", "fast")
"""How float activations meet integer weights."""
FLOAT = "float"
"""The `head_format` of a head that stays as it is."""
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a torch dtype: `fp32` for torch.float32, `uint8` for torch.uint8."""
    return next((short for short, known in DTYPE_NAMES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class QuantScheme:
    """What a compiled model computes in and stores: `weight=None` keeps weights in the computation dtype `compute`.

    `ignore` holds names or `re:` patterns of weights (as the model calls them) to be left alone; first match wins.
    `head` is the format of the output head, and of the token embedding where that is the same matrix; rounded to nearest, and multiplied
    with float activations in schemes that quantize these. None leaves them alone. `quantize_head` and `quantize_embedding` take head and
    embedding in among the weights, in their format.
    `activation` is what linears and convolutions with quantized weights read; None leaves activations in the computation dtype.
    `matmul` says how float activations meet integer weights: `exact`ly, or `fast`, rounded to int8 while the model runs; bases and
    rounding of weights are the same for both. Raises FormatError for a fast matmul of a scheme that has none, or a head without weights.
    """

    name: str
    compute: torch.dtype | None = None
    weight: QuantFormat | None = None
    cache: CacheFormat = PLAIN
    ignore: tuple[str, ...] = ()
    quantize_head: bool = False
    quantize_embedding: bool = False
    activation: ActivationFormat | None = None
    matmul: str = "exact"
    head: QuantFormat | None = None

    def __post_init__(self) -> None:
        if self.matmul not in MATMULS:
            raise FormatError(f"matmul={self.matmul!r}: expected one of {', '.join(MATMULS)}")
        if self.head is not None and self.weight is None:
            raise FormatError(f"scheme {self.name}: expected quantized weights beside a head in {self.head}; choose int8 or int4")
        if self.matmul == "fast" and self.activation is not None:
            raise FormatError(f"scheme {self.name}: expected float activations for matmul='fast', got {self.activation}; leave matmul out")
        if self.matmul == "fast" and (self.weight is None or not self.weight.element.is_integer):
            found = "float weights" if self.weight is None else f"weights in {self.weight}"
            raise FormatError(f"scheme {self.name}: expected integer weights for matmul='fast', got {found}; choose int8 or int4")

    def with_options(self, **options: Unpack[SchemeOptions]) -> QuantScheme:
        """A copy with those options replaced that are not None; `weight_format` is text such as `nf4 g36 sym int8`, `head_format` too.

        Raises:
            OptionError: for an option that does not exist, or a value of another kind.
            FormatError: if a weight option is given to a scheme without quantized weights, an activation option to one without quantized
                activations, a fast matmul to one without integer weights, or the combination does not exist.
        """
        given = given_options(options)
        kept: dict[str, Any] = {name: given[name] for name in ("quantize_head", "quantize_embedding", "matmul") if name in given}
        ignore = tuple(given.get("ignore", self.ignore))
        cache = self.cache.with_options(given)
        if "head_format" in given:
            kept["head"] = None if given["head_format"] == FLOAT else parse_format(given["head_format"])
        return replace(self, weight=self._weight(given), activation=self._activation(given), cache=cache, ignore=ignore, **kept)

    def _weight(self, given: dict[str, Any]) -> QuantFormat | None:
        weight = parse_format(given["weight_format"]) if "weight_format" in given else self.weight
        changes = _fields(given, {"group_size": "granularity", "symmetric": "symmetric"})
        if weight is None and changes:
            raise FormatError(
                f"scheme {self.name}: expected quantized weights for group_size and symmetric, got float weights; "
                "choose int8 or int4, or set weight_format"
            )
        if "symmetric" in changes:
            changes["minimum"] = False
        return None if weight is None else replace(weight, **changes)

    def _activation(self, given: dict[str, Any]) -> ActivationFormat | None:
        names = {"group_size": "granularity", "symmetric": "symmetric", "static": "static", "clip": "clip"}
        changes = _fields(given, {f"activation_{name}": field for name, field in names.items()})
        if self.activation is None and changes:
            wanted = ", ".join(name for name in given if name.startswith("activation_"))
            raise FormatError(
                f"scheme {self.name}: expected quantized activations for {wanted}, got float activations; choose w8a8, w4a8, w4a4 or fp8"
            )
        return None if self.activation is None else replace(self.activation, **changes)


def _fields(given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Fields of a format -> their values, from the options of those names; a group size becomes a granularity."""
    return {
        field: Granularity(given[option]) if field == "granularity" else given[option] for option, field in names.items() if option in given
    }


FP32 = QuantScheme("fp32", compute=torch.float32)
BF16 = QuantScheme("bf16", compute=torch.bfloat16)
FP16 = QuantScheme("fp16", compute=torch.float16)
W8A16 = QuantScheme("int8", weight=QuantFormat(INT8))
W4A16 = QuantScheme("int4", weight=QuantFormat(INT4, Granularity(64)))

W8A8 = QuantScheme("w8a8", weight=QuantFormat(INT8), activation=ActivationFormat(INT8))
W4A8 = QuantScheme("w4a8", weight=QuantFormat(INT4, Granularity(64)), activation=ActivationFormat(INT8))
W4A4 = QuantScheme("w4a4", weight=QuantFormat(INT4, Granularity(64)), activation=ActivationFormat(INT4, Granularity(64)))
FP8_DYNAMIC = QuantScheme("fp8", weight=QuantFormat(FP8), activation=ActivationFormat(FP8))
W3A16 = QuantScheme("int3", weight=QuantFormat(element("int3"), Granularity(64)))
W2A16 = QuantScheme("int2", weight=QuantFormat(element("int2"), Granularity(64), symmetric=False))
NF4A16 = QuantScheme("nf4", weight=QuantFormat(NF4, Granularity(64)))
MXINT8A16 = QuantScheme("mxint8", weight=MXINT8)
MXFP4A16 = QuantScheme("mxfp4", weight=MXFP4)
NVFP4A16 = QuantScheme("nvfp4", weight=NVFP4)

SCHEMES = {
    "fp32": FP32, "bf16": BF16, "fp16": FP16, "int8": W8A16, "w8a16": W8A16, "int4": W4A16, "w4a16": W4A16,
    "w8a8": W8A8, "w4a8": W4A8, "w4a4": W4A4, "fp8": FP8_DYNAMIC, "fp8_dynamic": FP8_DYNAMIC,
    "int3": W3A16, "w3a16": W3A16, "int2": W2A16, "w2a16": W2A16, "nf4": NF4A16, "mxint8": MXINT8A16,
    "mxfp4": MXFP4A16, "mxfp4a16": MXFP4A16, "nvfp4": NVFP4A16, "nvfp4a16": NVFP4A16,
}  # fmt: skip
"""Presets, with their names in compressed-tensors; its NVFP4 and MXFP4 quantize activations too, ours the weights alone."""


HEAD = QuantFormat(INT8, Granularity(32))
"""What a head can be stored in at no cost that can be measured: a quarter of the bytes that it takes in float32."""


def scheme(name: str) -> QuantScheme:
    """The preset called `name`, case-insensitive.

    Raises:
        TargetError: for an unknown name, listing the known ones.
    """
    try:
        return SCHEMES[name.lower()]
    except KeyError:
        raise TargetError(f"scheme {name!r}: expected one of {', '.join(SCHEMES)}") from None
