"""Which forms of cached vectors are read and written, and the C++ that kernels over them share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from qcompile.codegen.cpp.source import SEPARATOR, Lines
from qcompile.errors import FormatError
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.vector_format import VectorFormat, vector_format

WIDTHS = (2, 4, 8)
"""Bits of codes that a byte holds a whole number of."""
TOGETHER = (1, 16, 32, 64, 128)
"""Tokens that share scales: whole vectors, and whole stretches of keys."""
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
    if not isinstance(form, VectorFormat) or not form.element.is_integer or form.element.bits not in WIDTHS:
        return f"{text}: expected {' or '.join(f'int{bits}' for bits in WIDTHS)} with scales among the codes"
    if form.tokens not in TOGETHER:
        return f"{text}: expected a scale for {', '.join(map(str, TOGETHER))} tokens"
    share, per_byte = size // form.groups(size), 8 // form.element.bits
    if form.tokens == 1 and form.groups(size) > 1 and share % per_byte:
        return f"{text}: expected groups of whole bytes, got {share} numbers of {form.element.bits} bits"
    return refuses_size(size)


def refuses_size(size: int) -> str | None:
    """Heads that do not fit on the stack."""
    return f"D={size}: expected a head size of at most {WIDEST_HEAD}" if size > WIDEST_HEAD else None


def refuses_forms(spec: KernelSpec, *options: str, together: bool = True) -> str | None:
    """The first objection to the forms that options of a specification name; without `together` tokens have scales of their own."""
    for option in options:
        text = str(spec.option(option))
        reason = refuses_form(text, spec.size("D"))
        if reason is None and not together and vector_format(text).tokens > 1:
            reason = f"{option} is {text}: expected scales of each token"
        if reason is not None:
            return reason
    return None


def form_of(spec: KernelSpec, option: str) -> VectorFormat:
    """The form that an option of a specification names, which is not refused."""
    form = vector_format(str(spec.option(option)))
    assert isinstance(form, VectorFormat)
    return form


def form_type(spec: KernelSpec, option: str, name: str) -> str:
    """The declaration of the C++ type of a form."""
    form, size = form_of(spec, option), spec.size("D")
    share = size if form.tokens > 1 else size // form.groups(size)
    signed = "true" if form.symmetric else "false"
    return f"typedef Packed<{size}, {form.element.bits}, {share}, {form.tokens}, {signed}> {name};  // {form}"
