"""Specifications the way the lowering pass builds them: everything sorted by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcompile.codegen.triton.elements import SCALE_STORAGE, SECOND_LEVEL
from qcompile.ir.lowered import KernelSpec


def spec(operator: str, bucket: str = "", *, sizes: dict[str, int], formats: dict[str, str | None], **options: Any) -> KernelSpec:
    """A specification; operands whose format is None are left out."""
    present = {name: kind for name, kind in formats.items() if kind is not None}
    return KernelSpec(operator, tuple(sorted(sizes.items())), tuple(sorted(present.items())), tuple(sorted(options.items())), bucket)


def with_option(spec: KernelSpec, **options: object) -> KernelSpec:
    """The specification with other or more options."""
    return replace(spec, options=tuple(sorted({**dict(spec.options), **options}.items())))


def with_format(spec: KernelSpec, **formats: str) -> KernelSpec:
    """The specification with other storages."""
    return replace(spec, formats=tuple(sorted({**dict(spec.formats), **formats}.items())))


def linear(rows: int, columns: int, bucket: str, dtype: str = "bf16", bias: bool = False) -> KernelSpec:
    """A linear layer with a 16-bit weight."""
    formats = {"x": dtype, "weight": dtype, "out": dtype, "bias": dtype if bias else None}
    return spec("linear", bucket, sizes={"N": rows, "K": columns}, formats=formats)


def quantized_linear(
    rows: int, columns: int, bucket: str, form: str = "int4 g64 sym fp16", dtype: str = "bf16", bias: bool = False
) -> KernelSpec:
    """A linear layer with a quantized weight."""
    stored = form.rsplit(" ", maxsplit=1)[-1].partition("/")[0]
    formats = {
        "x": dtype,
        "codes": form,
        "scale": SCALE_STORAGE.get(stored, stored),
        "scale2": SECOND_LEVEL.get(stored),
        "zero": "uint8" if " asym " in form else None,
        "bias": dtype if bias else None,
        "out": dtype,
    }
    return spec("quantized_linear", bucket, sizes={"N": rows, "K": columns}, formats=formats)


def rms_norm(columns: int, dtype: str = "bf16", *, weight: bool = True, residual: bool = False, offset: float = 0.0) -> KernelSpec:
    """RMS normalization, with the residual sum if asked for."""
    formats = {"x": dtype, "weight": dtype if weight else None, "out": dtype, **({"residual": dtype, "out1": dtype} if residual else {})}
    return spec("add_rms_norm" if residual else "rms_norm", sizes={"K": columns}, formats=formats, eps=1e-5, offset=offset)


def gather_last(columns: int, dtype: str = "bf16") -> KernelSpec:
    """The last row of each sequence."""
    return spec("gather_last", sizes={"K": columns}, formats={"x": dtype, "positions": "i64", "out": dtype})


def attend(
    heads: int,
    key_heads: int,
    size: int,
    bucket: str,
    dtype: str = "bf16",
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: str | None = None,
) -> KernelSpec:
    """Attention over the cache."""
    formats = {"q": dtype, "keys": dtype, "values": dtype, "page_table": "i32", "positions": "i64", "sinks": sinks, "out": dtype}
    sizes = {"H": heads, "L": key_heads, "D": size}
    return spec("cache_attend", bucket, sizes=sizes, formats=formats, scale=size**-0.5, window=window, softcap=softcap)


def append(key_heads: int, size: int, dtype: str = "bf16") -> KernelSpec:
    """Writing into the cache."""
    formats = {"keys": dtype, "values": dtype, "k": dtype, "v": dtype, "page_table": "i32", "positions": "i64"}
    return spec("cache_append_", sizes={"L": key_heads, "D": size}, formats=formats)


def rope(heads: int, size: int, dtype: str = "bf16") -> KernelSpec:
    """Rotary positions."""
    return spec("rope", sizes={"H": heads, "R": size}, formats={"x": dtype, "cos": dtype, "sin": dtype, "out": dtype})


def rotary_table(frequencies: int, dtype: str = "bf16") -> KernelSpec:
    """The table of cosines and sines."""
    formats = {"positions": "i64", "inv_freq": "fp32", "out": dtype, "out1": dtype}
    return spec("rotary_table", sizes={"F": frequencies}, formats=formats, scaling=1.0)


def gated_activation(columns: int, activation: str = "silu", dtype: str = "bf16") -> KernelSpec:
    """SwiGLU and its relatives."""
    return spec("gated_activation", sizes={"I": columns}, formats={"gate": dtype, "up": dtype, "out": dtype}, activation=activation)


def embedding(rows: int, columns: int, form: str | None = None, dtype: str = "bf16") -> KernelSpec:
    """A table of 16-bit or quantized rows."""
    if form is None:
        return spec("embedding", sizes={"N": rows, "K": columns}, formats={"indices": "i64", "weight": dtype, "out": dtype})
    formats = {
        "indices": "i64",
        "codes": form,
        "scale": form.rsplit(" ", maxsplit=1)[-1],
        "zero": "uint8" if " asym " in form else None,
        "out": dtype,
    }
    return spec("quantized_embedding", sizes={"N": rows, "K": columns}, formats=formats)


def argmax(logits: int, dtype: str = "bf16") -> KernelSpec:
    """The index of the largest logit."""
    return spec("argmax", sizes={"N": logits}, formats={"logits": dtype, "out": "i64"})


def topk(logits: int, count: int, dtype: str = "bf16") -> KernelSpec:
    """The largest logits and their indices."""
    return spec("topk", sizes={"N": logits}, formats={"logits": dtype, "out": dtype, "out1": "i64"}, k=count)


def small_llama(form: str = "int4 g64 sym fp16") -> list[KernelSpec]:
    """Every kernel of a model shaped like SmolLM2-135M: d 576, heads 9 over 3, head size 64, intermediate 1536."""
    buckets = ("m1", "m2-63", "m64")
    shapes = ((960, 576), (576, 576), (3072, 576), (576, 1536))
    return [
        embedding(49152, 576),
        rms_norm(576),
        rms_norm(576, residual=True),
        *(quantized_linear(rows, columns, bucket, form) for rows, columns in shapes for bucket in buckets),
        rotary_table(32),
        rope(9, 64),
        rope(3, 64),
        append(3, 64),
        attend(9, 3, 64, "m1"),
        attend(9, 3, 64, "m64"),
        gated_activation(1536),
        *(linear(49152, 576, bucket) for bucket in buckets),
        argmax(49152),
        topk(49152, 50),
    ]
