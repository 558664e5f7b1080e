"""Which forms of cached vectors are read and written, and the C++ that kernels over them share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from qcompile.codegen.cpp.source import SEPARATOR, Lines
from qcompile.errors import FormatError
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.element import FP8
from qcompile.quant.vector_format import VectorFormat, vector_format
from qcompile.quant.vectors.static import StaticFormat

WIDTHS = (2, 4, 8)
"""Bits of codes that a byte holds a whole number of."""
TOGETHER = (1, 16, 32, 64, 128)
"""Tokens that share scales: whole vectors, and whole stretches of keys."""
TABLES = {"k_tables_0": ("fp16",), "v_tables_0": ("fp16",)}
"""Operands of forms whose scales are calibrated: [L, D], one for each channel."""
WIDEST_HEAD = 512
"""Numbers of a head: several of them stand on the stack for each query."""


@cache
def helpers(*files: str) -> list[Lines]:
    """The functions of header files of this folder, one after the other."""
    texts = (Path(__file__).with_name(f"{name}.h").read_text(encoding="utf-8") for name in files)
    return [part.split("\n") for text in texts for part in text.rstrip("\n").split(SEPARATOR)]


def refuses_form(text: str, size: int) -> str | None:
    """Why vectors of `size` numbers in a form are not read, or None."""
    try:
        form = vector_format(text)
    except FormatError as error:
        return str(error)
    if isinstance(form, StaticFormat) and form.element.bits in WIDTHS:
        return refuses_size(size)
    if not isinstance(form, VectorFormat) or (form.element.bits not in WIDTHS and form.element != FP8):
        return f"{text}: expected {', '.join(f'int{bits}' for bits in WIDTHS)} or fp8 with scales among the codes, or static ones"
    if form.tokens not in TOGETHER:
        return f"{text}: expected a scale for {', '.join(map(str, TOGETHER))} tokens"
    share, per_byte = size // form.groups(size), 8 // form.element.bits
    if form.tokens == 1 and form.groups(size) > 1 and share % per_byte:
        return f"{text}: expected groups of whole bytes, got {share} numbers of {form.element.bits} bits"
    return refuses_size(size)


def refuses_size(size: int) -> str | None:
    """Heads that do not fit on the stack."""
    return f"D={size}: expected a head size of at most {WIDEST_HEAD}" if size > WIDEST_HEAD else None


def refuses_forms(spec: KernelSpec, *options: str, together: bool = True, tables: bool = False) -> str | None:
    """The first objection to the forms that options of a specification name.

    Without `together` tokens have scales of their own. With `tables` forms may have them: operands by the option's name, such as
    `k_tables_0` for `k_form` and `tables_0` for `form`, which must be there then, and only then.
    """
    for option in options:
        text, table = str(spec.option(option)), option.replace("form", "tables_0")
        reason = refuses_form(text, spec.size("D"))
        if reason is None and not together and vector_format(text).tokens > 1:
            reason = f"{option} is {text}: expected scales of each token"
        if reason is None and vector_format(text).tables and not tables:
            reason = f"{option} is {text}: expected scales among the codes"
        if reason is None and bool(vector_format(text).tables) != bool(spec.format(table)):
            reason = f"{option} is {text}: expected {'a' if vector_format(text).tables else 'no'} table of scales, {table}"
        if reason is not None:
            return reason
    return None


def form_of(spec: KernelSpec, option: str) -> VectorFormat | StaticFormat:
    """The form that an option of a specification names, which is not refused."""
    form = vector_format(str(spec.option(option)))
    assert isinstance(form, VectorFormat | StaticFormat)
    return form


def form_type(spec: KernelSpec, option: str, name: str) -> str:
    """The declaration of the C++ type of a form, with what its codes are multiplied with in two bytes where products are fast."""
    form, size = form_of(spec, option), spec.size("D")
    if isinstance(form, StaticFormat):
        share, kind = size, "STATIC"
    else:
        share = size if form.tokens > 1 else size // form.groups(size)
        kind = "FLOAT8" if form.element == FP8 else "SIGNED" if form.symmetric else "LEAST"
    digits = ", 2" if spec.option("products", "") == "fast" else ""
    return f"typedef Packed<{size}, {form.element.bits}, {share}, {form.tokens}, Kind::{kind}{digits}> {name};  // {form}"
