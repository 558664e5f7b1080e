"""Formats of weights and caches, and the schemes that combine them; presets are module constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qcompile.errors import FormatError, TargetError
from qcompile.quant.element import INT4, INT8
from qcompile.quant.format import QuantFormat as QuantFormat
from qcompile.quant.granularity import Granularity

DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a torch dtype: `fp32` for torch.float32, `uint8` for torch.uint8."""
    return next((short for short, known in DTYPE_NAMES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored; `dtype=None` is the computation dtype.

    `bits` below 16 packs each token and head into codes with a scale and a least value of its own; then `dtype` is not used.
    """

    name: str = "kv"
    dtype: torch.dtype | None = None
    bits: int | None = None


@dataclass(frozen=True)
class QuantScheme:
    """What a compiled model computes in and stores: `weight=None` keeps weights in the computation dtype `compute`.

    `ignore` holds names or `re:` patterns of weights (as the model calls them) to be left alone; first match wins.
    `quantize_head` and `quantize_embedding` take in the output head and the token embedding, left alone by default.
    """

    name: str
    compute: torch.dtype | None = None
    weight: QuantFormat | None = None
    cache: CacheFormat = CacheFormat()
    ignore: tuple[str, ...] = ()
    quantize_head: bool = False
    quantize_embedding: bool = False

    def with_options(
        self, *, group_size: int | None = None, symmetric: bool | None = None, ignore: tuple[str, ...] | None = None,
        quantize_head: bool | None = None, quantize_embedding: bool | None = None,
    ) -> QuantScheme:  # fmt: skip
        """A copy with those options replaced that are not None.

        Raises:
            FormatError: if a weight option is given to a scheme without quantized weights.
        """
        weight = self.weight
        if weight is None and (group_size is not None or symmetric is not None):
            raise FormatError(
                f"scheme {self.name}: expected quantized weights for group_size and symmetric, got float weights; choose int8 or int4"
            )
        if weight is not None and group_size is not None:
            weight = replace(weight, granularity=Granularity(group_size))
        if weight is not None and symmetric is not None:
            weight = replace(weight, symmetric=symmetric)
        return replace(
            self, weight=weight, ignore=self.ignore if ignore is None else ignore,
            quantize_head=self.quantize_head if quantize_head is None else quantize_head,
            quantize_embedding=self.quantize_embedding if quantize_embedding is None else quantize_embedding,
        )  # fmt: skip


FP32 = QuantScheme("fp32", compute=torch.float32)
BF16 = QuantScheme("bf16", compute=torch.bfloat16)
FP16 = QuantScheme("fp16", compute=torch.float16)
W8A16 = QuantScheme("int8", weight=QuantFormat(INT8))
W4A16 = QuantScheme("int4", weight=QuantFormat(INT4, Granularity(64)))

SCHEMES = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "int8": W8A16, "w8a16": W8A16, "int4": W4A16, "w4a16": W4A16}
CACHES = {
    "kv": CacheFormat(),
    "kv16": CacheFormat("kv16", torch.float16),
    "kv8": CacheFormat("kv8", bits=8),
    "kv4": CacheFormat("kv4", bits=4),
}


def scheme(name: str) -> QuantScheme:
    """The preset called `name`, case-insensitive.

    Raises:
        TargetError: for an unknown name, listing the known ones.
    """
    try:
        return SCHEMES[name.lower()]
    except KeyError:
        raise TargetError(f"scheme {name!r}: expected one of {', '.join(SCHEMES)}") from None
