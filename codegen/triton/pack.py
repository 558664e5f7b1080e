"""Packing a vector as its form defines it (`packed_forms.py`), bit for bit."""

from __future__ import annotations

import torch

from qcompile.codegen.triton.block_vectors import BlockVectors
from qcompile.codegen.triton.packed_forms import PackedForm
from qcompile.codegen.triton.packed_vectors import PackedVectors
from qcompile.codegen.triton.quantize import FLOAT8_LARGEST, round_lines
from qcompile.codegen.triton.source import Lines
from qcompile.codegen.triton.tiles import power_of_two
from qcompile.quant.element import FP8
from qcompile.quant.vector_format import VectorFormat
from qcompile.quant.vectors.block import BlockFormat

LEAST_SCALE = torch.finfo(torch.float16).tiny
"""Nothing is divided by less."""
FLOAT8_LEAST = 2.0**-6
"""The least normal float8 (e4m3)."""


def refuses_pack(vectors: PackedForm) -> str | None:
    """Groups that no reshape cuts out of a padded vector."""
    if vectors.share < vectors.size and vectors.share & (vectors.share - 1):
        return f"{vectors.form}: expected groups of a power of two to pack, got {vectors.share} of {vectors.size} numbers"
    return None


def held(vectors: PackedForm) -> int:
    """Numbers of a vector, padded."""
    return power_of_two(vectors.size)


def pack_lines(vectors: PackedForm, numbers: str, pages: str, cell: str, present: str) -> Lines:
    """Store the vector `numbers`, float32 [held], at the pointer `pages` + `cell` if `present`; `dim` is 0 to held - 1."""
    group = held(vectors) if vectors.share == vectors.size else vectors.share
    return [
        f"grouped = tl.reshape({numbers}, [{held(vectors) // group}, {group}])",
        f"inside = tl.reshape(dim, [{held(vectors) // group}, {group}]) < {vectors.size}",
        *round_numbers(vectors.form),
        *_code_stores(vectors, pages, cell, present),
        f"group = tl.arange(0, {held(vectors) // group})",
        *_size_stores(vectors, pages, cell, present),
    ]


def round_numbers(form: VectorFormat | BlockFormat) -> Lines:
    """Codes of `grouped`, and what gives them their size, in either form."""
    return round_blocks(form) if isinstance(form, BlockFormat) else round_groups(form)


def round_groups(form: VectorFormat) -> Lines:
    """Codes of `grouped`, float32 [groups, numbers], where `inside`, else 0: `codes` int32, `scale` and `least` float16 [groups]."""
    ranges = _signed_range(form) if form.symmetric else _unsigned_range(form)
    return [*ranges, "codes = tl.where(inside, codes, 0)"]


def round_blocks(form: BlockFormat) -> Lines:
    """Codes of `grouped`, float32 [blocks, numbers], where `inside`, else 0: `codes` int32, `exponent` int32 [blocks] of the power."""
    half = 1 << (form.bits - 1)
    return [
        "greatest = tl.max(tl.where(inside, tl.abs(grouped), 0.0), axis=1)",
        f"exponent = tl.maximum((greatest.to(tl.int32, bitcast=True) >> 23) - {form.bits - 2}, 1)",
        "step = (exponent << 23).to(tl.float32, bitcast=True)[:, None]",
        *round_lines("codes", "tl.div_rn(grouped, step)", -half, half - 1),
        f"codes = tl.where(inside, codes + {half}, 0)",
    ]


def _usable(spread: str) -> Lines:
    return [f"scale = tl.maximum({spread}, {LEAST_SCALE}).to(tl.float16)", "step = scale.to(tl.float32)[:, None]"]


def _unsigned_range(form: VectorFormat) -> Lines:
    top = form.element.levels - 1
    return [
        'least = tl.min(tl.where(inside, grouped, float("inf")), axis=1).to(tl.float16)',
        "base = least.to(tl.float32)",
        'greatest = tl.max(tl.where(inside, grouped, float("-inf")), axis=1)',
        *_usable(f"tl.div_rn(greatest - base, {float(top)})"),
        *round_lines("codes", "tl.div_rn(grouped - base[:, None], step)", 0, top),
    ]


def _signed_range(form: VectorFormat) -> Lines:
    element = form.element
    largest = FLOAT8_LARGEST if element == FP8 else float(element.high)
    lines = [
        "greatest = tl.max(tl.where(inside, tl.abs(grouped), 0.0), axis=1)",
        *_usable(f"tl.div_rn(greatest, {largest})"),
    ]
    if element == FP8:
        return [*lines, *_float8_lines("tl.div_rn(grouped, step)")]
    return [*lines, *round_lines("codes", "tl.div_rn(grouped, step)", element.low, element.high), f"codes -= {element.low}"]


def _float8_lines(scaled: str) -> Lines:
    """`codes`, the bits of float8 (e4m3), to nearest even: no conversion instruction, which sm80 lacks."""
    return [
        f"scaled = tl.minimum(tl.maximum({scaled}, -{FLOAT8_LARGEST}), {FLOAT8_LARGEST})",
        "bits = tl.abs(scaled).to(tl.int32, bitcast=True)",
        "# A float32 has 20 bits of mantissa more, and an exponent that counts from 120 less; what is below 2^-6 counts in steps of 2^-9.",
        "normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960",
        *round_lines("small", "tl.abs(scaled) * 512.0", 0, 8),
        f"codes = tl.where(tl.abs(scaled) < {FLOAT8_LEAST}, small, normal) + tl.where(scaled < 0.0, 128, 0)",
    ]


def _code_stores(vectors: PackedForm, pages: str, cell: str, present: str) -> Lines:
    if vectors.per_byte == 1:
        flat = f"tl.reshape(codes, [{held(vectors)}]).to(tl.uint8)"
        return [f"tl.store({pages} + {cell} + dim, {flat}, mask=(dim < {vectors.size}) & {present})"]
    count = held(vectors) // vectors.per_byte
    return [
        f"shift = tl.arange(0, {vectors.per_byte}) * {vectors.bits}",
        f"packed = tl.sum(tl.reshape(codes, [{count}, {vectors.per_byte}]) << shift[None, :], axis=1).to(tl.uint8)",
        f"byte = tl.arange(0, {count})",
        f"tl.store({pages} + {cell} + byte, packed, mask=(byte < {vectors.body}) & {present})",
    ]


def _size_stores(vectors: PackedForm, pages: str, cell: str, present: str) -> Lines:
    """What gives the codes their size: powers, or scales and least values."""
    at = f"{cell} + {vectors.body}"
    if isinstance(vectors, BlockVectors):
        return [f"tl.store({pages} + {at} + group, exponent.to(tl.uint8), mask=(group < {vectors.blocks}) & {present})"]
    least = f"{cell} + {vectors.body + 2 * vectors.groups}"
    return [
        *_half_stores(vectors, "scale", pages, at, present),
        *(_half_stores(vectors, "least", pages, least, present) if vectors.has_middle else []),
    ]


def _half_stores(vectors: PackedVectors, half: str, pages: str, at: str, present: str) -> Lines:
    mask = f"mask=(group < {vectors.groups}) & {present}"
    if vectors.even:
        return [f"tl.store(({pages} + {at} + 2 * group).to(tl.pointer_type(tl.float16)), {half}, {mask})"]
    return [
        f"bits = {half}.to(tl.uint16, bitcast=True)",
        f"tl.store({pages} + {at} + 2 * group, (bits & 255).to(tl.uint8), {mask})",
        f"tl.store({pages} + {at} + 2 * group + 1, (bits >> 8).to(tl.uint8), {mask})",
    ]
