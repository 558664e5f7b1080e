"""Specifications of kernels over packed caches, the way the lowering pass builds them."""

from __future__ import annotations

from qcompile.ir.lowered import KernelSpec
from qcompile.quant.vector_format import vector_format
from tests.codegen.triton.specs import spec

KV8, KVFP8, KV4 = "int8 g64 sym", "fp8 g64 sym", "int4 g64 asym"
BLOCK, SORTED = "bfp4 g16", "bfp4 g16 sorted"


def tables(k_form: str, v_form: str) -> dict[str, str]:
    """The tables of the forms that have one, as operands."""
    forms = {"k_tables_0": k_form, "v_tables_0": v_form or k_form}
    return {name: "uint8" for name, form in forms.items() if vector_format(form).tables}


def attend_packed(
    heads: int,
    key_heads: int,
    size: int,
    bucket: str,
    k_form: str = KV4,
    v_form: str = "",
    dtype: str = "bf16",
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: str | None = None,
) -> KernelSpec:
    """Attention over a cache whose tokens are packed as they come."""
    formats = {
        "q": dtype,
        "keys": "uint8",
        "values": "uint8",
        **tables(k_form, v_form),
        "page_table": "i32",
        "positions": "i64",
        "sinks": sinks,
        "out": dtype,
    }
    sizes = {"H": heads, "L": key_heads, "D": size}
    options = {"k_form": k_form, "v_form": v_form or k_form, "scale": size**-0.5, "window": window, "softcap": softcap}
    return spec("cache_attend_packed", bucket, sizes=sizes, formats=formats, **options)


def append_packed(key_heads: int, size: int, k_form: str = KV4, v_form: str = "", dtype: str = "bf16", *, rotated: int = 0) -> KernelSpec:
    """Packing and writing into the cache, keys rotated in blocks of `rotated` channels."""
    formats = {"keys": "uint8", "values": "uint8", "k": dtype, "v": dtype, "page_table": "i32", "positions": "i64"}
    formats |= tables(k_form, v_form)
    options = {"k_form": k_form, "v_form": v_form or k_form, **({"hadamard_size": rotated} if rotated else {})}
    return spec("append_packed_", sizes={"L": key_heads, "D": size}, formats=formats, **options)
