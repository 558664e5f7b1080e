"""Packed weights of any format, as our exporter describes them (`qcompile.exporters.onnx.described`): the nodes alone are arithmetic.

A description is a claim. It is read only where the numbers it stands for are those that the file's own nodes compute, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from onnx import TensorProto
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.frontend.onnx.parts import CODES, KINDS_OF_SCALES, Constants, Matrix, UnfitError, plain_name, unsigned
from qcompile.frontend.onnx.program import Step
from qcompile.frontend.onnx.weights import Weight
from qcompile.quant.described import BLOCKS, COLUMNS, LAYOUTS, LOOKUP, PACKED, PREFIX
from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.packing import packed_bytes, unpack

_FORMAT, _LAYOUT, _CODES = f"{PREFIX}format", f"{PREFIX}layout", f"{PREFIX}codes"
_FLOAT8 = TensorProto.FLOAT8E4M3FN


def is_described(step: Step) -> bool:
    """Whether a step tells what weight it makes or multiplies by."""
    return _FORMAT in step.metadata


def is_lookup(step: Step) -> bool:
    """Whether what it tells of is a table whose rows it takes."""
    return is_described(step) and step.metadata.get(_LAYOUT) == LOOKUP


def yields_columns(step: Step) -> bool:
    """Whether what it tells of is stored, and made, as [K, N]."""
    return step.metadata.get(_LAYOUT) == COLUMNS


def codes_of(step: Step) -> str:
    """What it calls the initializer of its codes."""
    return step.metadata.get(_CODES, "")


@dataclass(frozen=True)
class _Told:
    """Entries of a step, and the initializers that they name."""

    form: QuantFormat
    columns: int
    layout: str
    parts: dict[str, Weight]

    @property
    def rows(self) -> int:
        """N: the one size that scales always tell."""
        return self.parts["scale"].shape[0]

    @property
    def groups(self) -> int:
        """G."""
        return self.form.granularity.groups(self.columns)

    def require(self, part: str, shape: tuple[int, ...], kinds: tuple[int, ...]) -> None:
        """Refuse another shape or type."""
        found = self.parts[part]
        if found.shape != shape or found.kind not in kinds:
            raise UnfitError(f"it is described as {self.form}, and its {part} are {found.dtype} {list(found.shape)}")

    # What the initializers hold, as `qcompile.quant.reference.Quantized` has it

    def codes(self) -> Tensor:
        """Unsigned codes uint8 [N, K]."""
        stored, bits = self.parts["codes"], self.form.element.bits
        if self.layout in (PACKED, BLOCKS, LOOKUP):
            return unpack(stored.load().reshape(self.rows, -1), bits, self.columns)[:, : self.columns].contiguous()
        if stored.kind == _FLOAT8:
            return stored.load().view(torch.uint8)
        codes = unsigned(stored.load(), bits, CODES[stored.kind][1])
        return (codes.t() if self.layout == COLUMNS else codes).contiguous()

    def scale(self) -> Tensor:
        """Scales [N, G] in their own type."""
        stored = self.parts["scale"].load()
        if self.form.scale_dtype != torch.float8_e8m0fnu:
            return stored
        return torch.ldexp(torch.ones(stored.shape), stored.to(torch.int32)).to(torch.float8_e8m0fnu)

    def zero(self) -> Tensor:
        """Unsigned zero points uint8 [N, G], or minima [N, G] in their own type."""
        stored, bits = self.parts["zero"], self.form.element.bits
        if self.form.minimum:
            return stored.load()
        if self.layout == BLOCKS or (stored.kind == TensorProto.UINT8 and bits != 8):
            return unpack(stored.load(), bits, self.groups)[:, : self.groups].contiguous()
        zero = stored.load().reshape(stored.shape if len(stored.shape) == 2 else (self.rows, 1))
        return (zero.t() if self.layout == COLUMNS and len(stored.shape) == 2 else zero).contiguous()


def described(constants: Constants, step: Step) -> Matrix:
    """The weight that a step tells of.

    Raises:
        UnfitError: for entries that are incomplete, or do not go together with the initializers that they name.
    """
    told = _told(constants, step)
    bits = told.form.element.bits
    _require_codes(told, bits)
    kinds = (TensorProto.INT8,) if told.form.scale_dtype == torch.float8_e8m0fnu else (KINDS_OF_SCALES[told.form.scale_dtype],)
    told.require("scale", (told.rows, told.groups), kinds)
    if "scale2" in told.parts:
        runs = told.form.second_scales(told.groups)
        table = (told.rows, runs) if told.form.scale_dtype == torch.int8 else (1, 1)
        told.require("scale2", table, (TensorProto.FLOAT16,) if told.form.scale_dtype == torch.int8 else (TensorProto.FLOAT,))
    if "zero" in told.parts:
        _require_zero(told, bits)
    name = plain_name(told.parts["codes"].name)
    second = partial(told.parts["scale2"].load) if "scale2" in told.parts else None
    return Matrix(name, told.rows, told.columns, told.form, told.codes, told.scale, told.zero if "zero" in told.parts else None, second)


def _told(constants: Constants, step: Step) -> _Told:
    entries = {key.removeprefix(PREFIX): text for key, text in step.metadata.items() if key.startswith(PREFIX)}
    try:
        form = parse_format(entries["format"])
    except FormatError as error:
        raise UnfitError(f"its description: {error}") from error
    layout, columns = entries.get("layout", ""), entries.get("columns", "")
    if layout not in LAYOUTS or not columns.isdecimal() or int(columns) < 1:
        raise UnfitError(f"its description has the layout {layout!r} of {columns or 'no'} columns")
    missing = [part for part in form.parts if entries.get(part) not in constants.weights]
    if missing or len(constants.weights[entries["scale"]].shape) != 2:
        raise UnfitError(f"it is described as {form}, and the file has no initializer for its {missing[0] if missing else 'scale'}")
    return _Told(form, int(columns), layout, {part: constants.weights[entries[part]] for part in form.parts})


def _require_codes(told: _Told, bits: int) -> None:
    rows, columns = told.rows, told.columns
    if told.layout in (PACKED, LOOKUP):
        told.require("codes", (rows, packed_bytes(columns, bits)), (TensorProto.UINT8,))
    elif told.layout == BLOCKS:
        found = told.parts["codes"].shape
        least = packed_bytes(columns, bits)
        told.require("codes", found if len(found) == 3 and found[0] == rows and found[1] * found[2] >= least else (), (TensorProto.UINT8,))
    else:
        kinds = (_FLOAT8,) if told.form.element.name == "fp8" else tuple(
            kind for kind, (width, signed) in CODES.items() if width == bits and signed == told.form.symmetric
        )  # fmt: skip
        told.require("codes", (columns, rows) if told.layout == COLUMNS else (rows, columns), kinds)


def _require_zero(told: _Told, bits: int) -> None:
    rows, groups, found = told.rows, told.groups, told.parts["zero"]
    if told.form.minimum:
        told.require("zero", (rows, groups), (KINDS_OF_SCALES[told.form.scale_dtype],))
        return
    if told.layout == BLOCKS:  # each block has its own, also where a row has one
        count = groups if groups > 1 else told.parts["codes"].shape[1]
        told.require("zero", (rows, packed_bytes(count, bits)), (TensorProto.UINT8,))
        return
    if found.kind == TensorProto.UINT8 and bits != 8:
        told.require("zero", (rows, packed_bytes(groups, bits)), (TensorProto.UINT8,))
        return
    shape = (rows,) if len(found.shape) == 1 and groups == 1 else (groups, rows) if told.layout == COLUMNS else (rows, groups)
    told.require("zero", shape, (TensorProto.UINT4,) if bits == 4 else (TensorProto.UINT8,))


def require_same(found: Matrix, numbers: Tensor) -> None:
    """Refuse a description that stands for other numbers [N, K] than the file's nodes compute.

    Raises:
        UnfitError: if one of them differs.
    """
    if not torch.equal(found.numbers(), numbers):
        raise UnfitError(f"it is described as {found.form}, which stands for other numbers than its nodes compute")
