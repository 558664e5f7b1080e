"""A scheme as JSON values and back: every field, so that a scheme that no preset has comes back too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qcompile.errors import FormatError
from qcompile.quant.activation_format import ActivationFormat
from qcompile.quant.cache_format import CacheFormat
from qcompile.quant.element import element
from qcompile.quant.format import parse_format
from qcompile.quant.granularity import Granularity
from qcompile.quant.scheme import DTYPE_NAMES, QuantScheme, dtype_name
from qcompile.quant.vector_format import vector_format


def scheme_to_json(scheme: QuantScheme) -> dict[str, Any]:
    """Formats as text, dtypes by name."""
    cache, activation = scheme.cache, scheme.activation
    return {
        "name": scheme.name,
        "compute": _name(scheme.compute),
        "weight": None if scheme.weight is None else str(scheme.weight),
        "ignore": list(scheme.ignore),
        "quantize_head": scheme.quantize_head,
        "quantize_embedding": scheme.quantize_embedding,
        "activation": None if activation is None else {
            "element": activation.element.name, "group_size": activation.granularity.group_size, "symmetric": activation.symmetric,
            "static": activation.static, "clip": activation.clip,
        },
        "matmul": scheme.matmul,
        "head": None if scheme.head is None else str(scheme.head),
        "cache": {
            "name": cache.name, "dtype": _name(cache.dtype), "keys": None if cache.keys is None else str(cache.keys),
            "values": None if cache.values is None else str(cache.values), "sinks": cache.sinks, "window": cache.window,
            "before_positions": cache.before_positions, "layers": [list(pair) for pair in cache.layers],
            "rematerialized": cache.rematerialized, "bits": cache.bits,
        },
    }  # fmt: skip


def scheme_from_json(data: Any) -> QuantScheme:
    """Invert `scheme_to_json`.

    Raises:
        FormatError: for anything that it does not write.
    """
    try:
        weight, activation = data["weight"], data["activation"]
        return QuantScheme(
            str(data["name"]), _dtype(data["compute"]), None if weight is None else parse_format(weight), _cache(data["cache"]),
            tuple(map(str, data["ignore"])), bool(data["quantize_head"]), bool(data["quantize_embedding"]),
            None if activation is None else _activation(activation),
            str(data.get("matmul", "exact")), None if data.get("head") is None else parse_format(data["head"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"scheme: expected what scheme_to_json writes, got {type(error).__name__}: {error}") from error


def _cache(data: Mapping[str, Any]) -> CacheFormat:
    keys, values = (None if data[name] is None else vector_format(data[name]) for name in ("keys", "values"))
    layers = tuple((str(first), str(second)) for first, second in data["layers"])
    plain = {name: data[name] for name in ("sinks", "window", "before_positions", "rematerialized", "bits")}
    return CacheFormat(str(data["name"]), _dtype(data["dtype"]), keys, values, layers=layers, **plain)


def _activation(data: Mapping[str, Any]) -> ActivationFormat:
    return ActivationFormat(element(data["element"]), Granularity(data["group_size"]), data["symmetric"], data["static"], data["clip"])


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else dtype_name(dtype)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPE_NAMES[name]
