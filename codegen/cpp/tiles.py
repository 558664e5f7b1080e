"""Packed weights as C++ sees them: the type and the value of a `TileWeight` (`scales.h`), and the layouts of what it is made of."""

from __future__ import annotations

from qcompile.codegen.contract import stored
from qcompile.codegen.cpp.contract import TYPES
from qcompile.codegen.cpp.source import Lines
from qcompile.errors import FormatError
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.format import SCALE_TYPES, QuantFormat, parse_format

FIXED = ("digits", "planes", "scales", "fixed")
"""Headers of matmuls over codes that are integers."""
TABLES = ("planes", "scales", "tables")
"""Headers of those over codes that stand for floats."""
MOST_COLUMNS = 1 << 15
"""Of a row: some rows of x stand on the stack as products want them."""
RUN = 64
"""Columns of x at most that share an exponent (`FIXED_RUN`)."""
_STORAGE = {"e8m0": "float8_e8m0fnu", "e4m3": "fp8e4nv", "int8": "i8"}
"""Scales in 8 bits -> how a specification calls their storage."""
_SECOND = {"e4m3": "fp32", "int8": "fp16"}
"""Scales that have scales -> the storage of those."""
_LOOKED_UP = {"nf4": "Nf4", "fp8": "Fp8"}
"""Elements that are floats -> their C++ type."""


def format_of(spec: KernelSpec) -> QuantFormat:
    """The format of a specification's codes.

    Raises:
        FormatError: if they have none.
    """
    return parse_format(stored(spec, "codes"))


def refuses_tiles(spec: KernelSpec) -> str | None:
    """Why the codes, scales and zero points of a specification are not read, or None."""
    try:
        form = format_of(spec)
    except FormatError as error:
        return f"codes are {stored(spec, 'codes')!r}: {error}"
    kind = _scale_kind(form)
    wanted = {
        "scale": _STORAGE.get(kind, kind),
        "scale2": _SECOND.get(kind),
        "zero": kind if form.minimum else None if form.symmetric else "uint8",
    }
    for operand, expected in wanted.items():
        if spec.format(operand) != expected:
            return f"{operand} is {spec.format(operand)}: expected {expected or 'none'} for codes of {form}"
    return None


def looked_up(spec: KernelSpec) -> bool:
    """Whether codes stand for floats in a table rather than for integers."""
    return format_of(spec).element.name in _LOOKED_UP


def _scale_kind(form: QuantFormat) -> str:
    return next(name for name, dtype in SCALE_TYPES.items() if dtype == form.scale_dtype)


def group_of(spec: KernelSpec) -> int:
    """Columns of a group, 0 for all of a row."""
    size = format_of(spec).granularity.size(spec.size("K"))
    return 0 if size >= spec.size("K") else size


def _groups(spec: KernelSpec) -> int:
    return format_of(spec).granularity.groups(spec.size("K"))


def tile_weight(spec: KernelSpec) -> Lines:
    """`Kind`, the C++ type of a weight, and `weight`, the constant of that type; `rows` and `columns` are there."""
    scale_type, scale = _scale(spec)
    zero_type, zero = _zero(spec)
    return [
        f"typedef TileWeight<{_codes(spec)}, {group_of(spec)}, {scale_type}, {zero_type}> Kind;  // {stored(spec, 'codes')}",
        f"const Kind weight{{codes.at<int32_t>(), {scale}, {zero}, rows, columns}};",
    ]


def _codes(spec: KernelSpec) -> str:
    element = format_of(spec).element
    if element.is_integer:
        return f"Integers<{element.bits}>"
    return _LOOKED_UP.get(element.name, "Fp4")


def _scale(spec: KernelSpec) -> tuple[str, str]:
    """Type and value of the scales."""
    form, groups = format_of(spec), _groups(spec)
    kind = _scale_kind(form)
    if kind == "int8":
        runs = form.second_scales(groups)
        return "ScaledScales", f"{{scale.at<whole8>(), scale2.at<fp16>(), {groups}, {-(-groups // runs)}, {runs}}}"
    if kind == "e4m3":
        return "MatrixScales", f"{{scale.at<e4m3>(), scale2.at<float>(), {groups}}}"
    number = TYPES.get(kind, kind)
    return f"TileScales<{number}>", f"{{scale.at<{number}>(), {groups}}}"


def _zero(spec: KernelSpec) -> tuple[str, str]:
    """Type and value of the zero points."""
    form, groups = format_of(spec), _groups(spec)
    if form.symmetric:
        return "NoZeros", "{}"
    if form.minimum:
        number = TYPES[_scale_kind(form)]
        return f"TileMinima<{number}>", f"{{zero.at<{number}>(), {groups}}}"
    bits = form.element.bits
    held = -(-groups * bits // 8) * 8 // bits  # zero points are packed into whole bytes
    return f"ZeroCodes<{1 << (bits - 1)}>", f"{{zero.at<uint8_t>(), {held}}}"


def tile_layouts(spec: KernelSpec) -> list[tuple[str, str]]:
    """Operand -> layout, for those that a specification has."""
    form = format_of(spec)
    bits, kind = form.element.bits, _scale_kind(form)
    layouts = {
        "codes": f"tiles-planes{bits}",
        "scale": "tiles-bytes" if kind in ("e8m0", "e4m3") else "tiles",
        "zero": "tiles" if form.minimum or bits == 8 else f"tiles-zero{bits}",
    }
    if kind == "int8":
        layouts["scale2"] = "tiles"
    return [(name, layout) for name, layout in layouts.items() if spec.format(name) is not None]


def fixed_sizes(spec: KernelSpec) -> tuple[int, int]:
    """Words that a row of x takes for a weight of integers, and runs of columns that share an exponent (`every_run`)."""
    bits, columns = format_of(spec).element.bits, spec.size("K")
    block, group = 32 // (bits & -bits), group_of(spec) or columns
    words = runs = first = 0
    while first < columns:
        last = min(columns, first + RUN, (first // group + 1) * group)
        words += (-(-last // block) - first // block) * block
        runs, first = runs + 1, last
    return words + 16, runs
