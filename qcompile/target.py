"""Targets: `ARCH-SCHEME[-KV]`, such as `sm90-int4`, `cpu-int8-kv16`, `onnx-int4`, `reference-fp32`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from qcompile.errors import TargetError
from qcompile.quant.cache_format import CACHES, CacheFormat
from qcompile.quant.scheme import HEAD, SCHEMES, QuantScheme

ARCHITECTURES = ("cpu", "onnx", "reference", "sm80", "sm89", "sm90", "sm100")
_LOW_BIT = ("int8", "int4", "w8a8", "w4a8", "w4a4", "fp8", "int3", "int2", "nf4", "mxint8", "mxfp4", "nvfp4")
_ON_CPU = ("fp32", "bf16", *_LOW_BIT)
_ON_GPU = ("bf16", "fp16", *_LOW_BIT)
_ON_ONNX = ("fp32", *_LOW_BIT)  # onnxruntime multiplies no bfloat16 on CPUs


@dataclass(frozen=True)
class Target:
    """An architecture, a scheme with its computation dtype resolved, and the cache format inside the scheme."""

    arch: str
    scheme: QuantScheme

    @property
    def is_cuda(self) -> bool:
        """Whether the target is an NVIDIA GPU."""
        return self.arch.startswith("sm")

    @property
    def is_onnx(self) -> bool:
        """Whether the artifact is an ONNX file, which onnxruntime runs."""
        return self.arch == "onnx"

    @property
    def compute(self) -> torch.dtype:
        """The dtype activations are computed in."""
        assert self.scheme.compute is not None
        return self.scheme.compute

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype keys and values are stored in."""
        return self.scheme.cache.dtype or self.compute

    def __str__(self) -> str:
        suffix = "" if self.scheme.cache.name == "kv" else f"-{self.scheme.cache.name}"
        return f"{self.arch}-{self.scheme.name}{suffix}"


def known_targets() -> list[str]:
    """Every target that exists, without the cache suffix."""
    served = {arch: _ON_GPU if arch.startswith("sm") else _ON_CPU for arch in ARCHITECTURES} | {"onnx": _ON_ONNX}
    return [f"{arch}-{name}" for arch, names in served.items() for name in names]


def parse_target(text: str | Target) -> Target:
    """Read `ARCH-SCHEME[-KV]`; the dash before the cache may be left out where the scheme ends in a digit.

    Raises:
        TargetError: naming the part that is unknown and listing what is known.
    """
    if isinstance(text, Target):
        return text
    match = re.fullmatch(r"(?P<arch>[a-z]+\d*)-(?P<scheme>[a-z]+\d+[a-z0-9_]*?)(?:-?(?P<kv>kv[0-9a-z-]+))?", text.lower())
    if match is None or match["arch"] not in ARCHITECTURES:
        raise TargetError(f"target {text!r}: expected ARCH-SCHEME[-KV] as one of {', '.join(known_targets())}")
    name = SCHEMES[match["scheme"]].name if match["scheme"] in SCHEMES else match["scheme"]
    if f"{match['arch']}-{name}" not in known_targets():
        raise TargetError(
            f"target {text!r}: scheme {match['scheme']!r} is not served on {match['arch']}; expected one of {', '.join(known_targets())}"
        )
    kv = match["kv"] or "kv"
    if kv not in CACHES:
        raise TargetError(f"target {text!r}: cache {kv!r} is unknown; expected {', '.join(key for key in CACHES if key != 'kv')} or none")
    return resolve(match["arch"], _with_head(match["arch"], SCHEMES[name]), CACHES[kv])


def _with_head(arch: str, scheme: QuantScheme) -> QuantScheme:
    """On CPUs, where tokens wait for memory, the head of a scheme with integer weights is stored in what costs nothing (`HEAD`)."""
    integers = scheme.weight is not None and scheme.weight.element.is_integer
    return replace(scheme, head=HEAD) if integers and arch in ("cpu", "reference") else scheme


def resolve(arch: str, scheme: QuantScheme, cache: CacheFormat | None = None) -> Target:
    """A target from its parts: float32 is computed in on CPUs, bfloat16 on GPUs, unless the scheme says otherwise."""
    cuda = arch.startswith("sm")
    compute = scheme.compute or (torch.bfloat16 if cuda else torch.float32)
    cache = cache or scheme.cache
    if cache.dtype == torch.float16:
        cache = replace(cache, dtype=torch.bfloat16 if cuda else torch.float16)
    return Target(arch, replace(scheme, compute=compute, cache=cache))
