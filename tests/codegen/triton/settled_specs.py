"""Specifications of the operators of a cache that keeps some tokens as they came, the way the lowering pass builds them."""

from __future__ import annotations

from qcompile.ir.lowered import KernelSpec, item_operand
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format
from tests.codegen.triton.cache_specs import tables
from tests.codegen.triton.specs import spec

KIVI = Retention(4, 32, 32)
"""What `kv4-kivi` and `kv2-kivi` keep."""
SINKS = Retention(4, 0, 1)
"""First tokens only: every other one settles as it comes."""


def policy_options(policy: Retention) -> dict[str, int]:
    """A policy as the options of an operator."""
    return {"first": policy.first, "recent": policy.recent, "group": policy.group}


def with_recent(key_heads: int, size: int, policy: Retention = KIVI, dtype: str = "bf16", rows: str = "bf16") -> KernelSpec:
    """Rows of a sequence before its new tokens."""
    formats = {"rows": rows, "x": dtype, "slots": "i32", "out": rows}
    return spec("with_recent", sizes={"L": key_heads, "N": policy.rows, "D": size}, formats=formats)


def settle(key_heads: int, size: int, form: str, policy: Retention = KIVI, rows: str = "bf16") -> KernelSpec:
    """Packing what settles."""
    formats = {"pages": "uint8", "exact": rows, "page_table": "i32", "positions": "i64"}
    formats |= {item_operand("tables", 0): "uint8"} if vector_format(form).tables else {}
    return spec("settle_", sizes={"L": key_heads, "D": size}, formats=formats, form=form, **policy_options(policy))


def retain(key_heads: int, size: int, policy: Retention = KIVI, rows: str = "bf16") -> KernelSpec:
    """Keeping what goes on waiting."""
    formats = {"rows": rows, "exact": rows, "slots": "i32", "positions": "i64"}
    return spec("retain_", sizes={"L": key_heads, "D": size}, formats=formats, **policy_options(policy))


def attend_settled(
    heads: int,
    key_heads: int,
    size: int,
    bucket: str,
    forms: tuple[str, str] = ("int4 t32 asym", "int4 g32 asym"),
    policy: Retention = KIVI,
    *,
    dtype: str = "bf16",
    rows: str = "bf16",
    window: int = 0,
    softcap: float = 0.0,
    sinks: str | None = None,
) -> KernelSpec:
    """Attention over what has settled and what has not."""
    formats = {
        "q": dtype, "keys": "uint8", "values": "uint8", "exact_keys": rows, "exact_values": rows, "page_table": "i32", "positions": "i64",
        "sinks": sinks, "out": dtype, **tables(*forms),
    }  # fmt: skip
    options = {"k_form": forms[0], "v_form": forms[1], "scale": size**-0.5, "window": window, "softcap": softcap}
    sizes = {"H": heads, "L": key_heads, "D": size}
    return spec("attend_settled", bucket, sizes=sizes, formats=formats, **options, **policy_options(policy))
