"""Rotating, packing and storing the keys and values of a token in one program."""

from __future__ import annotations

from qcompile.codegen.triton.block_vectors import order_line
from qcompile.codegen.triton.cache import append_parameters
from qcompile.codegen.triton.contract import HALVES, TRITON_TYPES, Operator, kernel, same_storage, stored
from qcompile.codegen.triton.pack import pack_lines, refuses_pack
from qcompile.codegen.triton.packed_attention import forms_of, refuses_forms
from qcompile.codegen.triton.packed_forms import KEY_ORDER, PACKED, TABLES, VALUE_ORDER
from qcompile.codegen.triton.rotation import butterflies
from qcompile.codegen.triton.source import Lines, constants, function
from qcompile.codegen.triton.tiles import Architecture, power_of_two, row_warps
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

WIDEST_VECTOR = 1024


def refuses_append_packed(spec: KernelSpec) -> str | None:
    """Forms that no kernel packs, and rotations that are no power of two, or of keys that are read in an order of their own."""
    size, rotated = spec.size("D"), int(spec.option("hadamard_size", 0))
    if size > WIDEST_VECTOR:
        return f"D={size}: expected a head size of at most {WIDEST_VECTOR}"
    if rotated < 0 or rotated & (rotated - 1) or (rotated and size % rotated):
        return f"hadamard_size={rotated}: expected a power of two that divides D={size}, or 0"
    if rotated and spec.format(KEY_ORDER) is not None:
        return f"hadamard_size={rotated}: expected keys that are rotated before, as they are read in the order of {KEY_ORDER}"
    unread = refuses_forms(spec) or same_storage(spec, "k", "v")
    return unread or next((reason for form in forms_of(spec) if (reason := refuses_pack(form))), None)


def numbers_of(spec: KernelSpec) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers of the program."""
    size, rotated = spec.size("D"), int(spec.option("hadamard_size", 0))
    bits = rotated.bit_length() - 1
    turned: dict[str, tuple[int | float, str]] = {"BITS": (bits, "rounds of butterflies"), "NORM": (2.0 ** (-bits / 2), "1 / sqrt(2^BITS)")}
    return {
        "L": (spec.size("L"), "key/value heads"),
        "D": (size, "numbers of a head"),
        "BLOCK_D": (power_of_two(size), "numbers of a head, padded"),
        **(turned if rotated > 1 else {}),
    }


def vector_lines(name: str, source: str, order: str = "") -> Lines:
    """The vector of the program's token and head, float32, its channels by the table `order` where there is one."""
    at = " + ".join(f"{index} * {source}_stride_{place}" for place, index in enumerate(("batch", "head", "token")))
    ordered = [order_line(f"{name}_channel", order, "dim", "dim < D")] if order else []
    place = f"{name}_channel" if order else "dim"
    return [*ordered, f"{name} = tl.load({source} + {at} + {place}, mask=dim < D, other=0.0).to(tl.float32)"]


def emit_append_packed(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Store k, v [B, L, S, D], packed, at `positions` [B, S] of keys, values uint8 [P, L, R, W]."""
    keys, values = forms_of(spec)
    numbers = numbers_of(spec)
    ordered = [name for name in TABLES if spec.format(name) is not None]
    # The operator rounds what it has rotated to the model's type, and packs that.
    turn = [f"key = (butterflies(key, BLOCK_D, BITS) * NORM).to({TRITON_TYPES[stored(spec, 'k')]}).to(tl.float32)"]
    body = [
        *constants(numbers),
        "token = tl.program_id(0).to(tl.int64)",
        "head = tl.program_id(1).to(tl.int64)",
        "batch = tl.program_id(2).to(tl.int64)",
        "dim = tl.arange(0, BLOCK_D)",
        "position = tl.load(positions + batch * sequence + token).to(tl.int32)",
        "page_slot = position // page_tokens",
        # -1 is padding; a slot beyond the table would be another sequence's page.
        "real = (position >= 0) & (page_slot < pages)",
        "page = tl.load(page_table + batch * pages + page_slot, mask=real, other=0).to(tl.int64)",
        "slot = (page * L + head) * page_tokens + position % page_tokens",
        *vector_lines("key", "k", KEY_ORDER if KEY_ORDER in ordered else ""),
        *(turn if "BITS" in numbers else []),
        *pack_lines(keys, "key", "keys", f"slot * {keys.width}", "real"),
        *vector_lines("value", "v", VALUE_ORDER if VALUE_ORDER in ordered else ""),
        *pack_lines(values, "value", "values", f"slot * {values.width}", "real"),
    ]
    parameters = append_parameters(spec, ordered)
    launch = Launch(spec.operator, ("sequence", spec.size("L"), "batch"), parameters, (), row_warps(power_of_two(spec.size("D"))))
    doc = "One program packs and stores one head of one token; a token at position -1 is padding and is not stored."
    main = function(spec.operator, [p.name for p in parameters], doc, body)
    return kernel(spec, arch, [*([butterflies()] if "BITS" in numbers else []), main], [launch])


APPEND_PACKED = Operator(
    emit=emit_append_packed,
    operands={
        "keys": PACKED,
        "values": PACKED,
        "k": HALVES,
        "v": HALVES,
        **dict.fromkeys(TABLES, PACKED),
        "page_table": ("i32",),
        "positions": ("i64",),
    },
    optional=frozenset(TABLES),
    sizes=("D", "L"),
    options=("k_form", "v_form", "hadamard_size"),
    required=("k_form", "v_form"),
    refuses=refuses_append_packed,
)
