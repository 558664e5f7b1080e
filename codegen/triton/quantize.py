"""Activations to codes and scales, whole rows at a time, alone or in one kernel with what makes and rotates the row."""

from __future__ import annotations

from qcompile.codegen.triton.contract import FLOATS, HALVES, TRITON_TYPES, Operator, integer, kernel, pointer, same_storage, stored
from qcompile.codegen.triton.elementwise import ACTIVATIONS
from qcompile.codegen.triton.produce import row_source, source_parameters, stride_parameters
from qcompile.codegen.triton.rotation import Row, helpers, refuses_row, rotate_lines, row_constants, row_of
from qcompile.codegen.triton.source import Lines, constants, function
from qcompile.codegen.triton.tiles import Architecture, row_warps
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

FLOAT8_LARGEST = 448.0
HALF_LEAST, HALF_MAX = 2.0**-24, 65504.0
"""The smallest and the greatest positive float16."""
ROUND, ROUND_BITS = 12582912.0, "0x4B400000"
"""1.5 · 2^23, and its bits as a float32: what is added to it has no fraction left."""


def groups_of(spec: KernelSpec) -> tuple[int, int]:
    """Columns of a group (0: the whole row is one) and groups in a row."""
    size, columns = int(spec.option("group_size", -1)), spec.size("K")
    return (0, 1) if size == -1 or size >= columns else (size, -(-columns // size))


def asymmetric(spec: KernelSpec) -> bool:
    """Whether codes have zero points."""
    return spec.operator.endswith("_asym")


def results(spec: KernelSpec) -> dict[str, str]:
    """What each result is called in this file -> its operand name."""
    names = ["codes", "scale", *(["zero"] if asymmetric(spec) else [])]
    if spec.format("residual"):
        names.insert(0, "sum")
    return {name: f"out{place or ''}" for place, name in enumerate(names)}


def refuses_quantize(spec: KernelSpec) -> str | None:
    """Rows that do not fit, groups that no reshape reaches, codes of another element, mixed activation types."""
    bits, element = spec.option("bits", 8), spec.option("element", "int")
    if (element, bits) not in (("int", 4), ("int", 8), ("fp8", 8)):
        return f"codes are {element} of {bits} bits: expected int of 4 or 8, or fp8"
    codes, wanted = spec.format(results(spec)["codes"]), "i8" if element == "int" else "fp8e4nv"
    if codes != wanted:
        return f"{results(spec)['codes']} is {codes}: expected {wanted} for {element} codes"
    if spec.operator != "quantize_static" and spec.format(results(spec)["scale"]) != scale_kind(spec):
        return f"{results(spec)['scale']} is {spec.format(results(spec)['scale'])}: expected {scale_kind(spec)} for the scale"
    if "activation" in dict(spec.options) and spec.option("activation") not in ACTIVATIONS:
        return f"activation {spec.option('activation')!r}: expected one of {', '.join(ACTIVATIONS)}"
    mixed = same_storage(spec, "x", "residual", "gate", "up", *(["out"] if spec.format("residual") else []))
    return mixed or refuses_row(spec) or refuses_groups(spec)


def refuses_groups(spec: KernelSpec) -> str | None:
    """Groups are cut out of a row by a reshape: powers of two, which no padding of the row may cross."""
    size, row = groups_of(spec)[0], row_of(spec)
    if size & (size - 1) or int(spec.option("group_size", -1)) < -1:
        return f"group_size={spec.option('group_size')}: expected a power of two, or -1 for the row"
    if size and row.scattered and row.size % size:
        return f"group_size={size}: expected a divisor of hadamard_size={row.size}"
    return None


def round_lines(target: str, scaled: str, low: int, high: int) -> Lines:
    """`target` = `scaled` clamped and rounded half to even, as int32."""
    return [
        f"bounded = tl.minimum(tl.maximum({scaled}, {float(low)}), {float(high)})",
        "# In 1.5 * 2^23 plus a number the low bits are that number, rounded half to even.",
        f"{target} = (bounded + {ROUND}).to(tl.int32, bitcast=True) - {ROUND_BITS}",
    ]


def scale_kind(spec: KernelSpec) -> str:
    """What scales are stored in: float16 for groups."""
    return "fp32" if int(spec.option("group_size", -1)) == -1 else "fp16"


def stored_lines(spec: KernelSpec) -> Lines:
    """`spread` as it is stored, so that codes are made by what will be read."""
    guard = "spread = tl.where(spread != 0.0, spread, 1.0)"
    if scale_kind(spec) == "fp32":
        return [guard]
    return [
        guard,
        f"size = tl.minimum(tl.maximum(tl.abs(spread), {HALF_LEAST!r}), {HALF_MAX})",
        "spread = tl.where(spread < 0.0, -size, size).to(tl.float16).to(tl.float32)",
    ]


def range_lines(spec: KernelSpec, axis: int) -> Lines:
    """`spread` of each group, its scale; for asymmetric codes also `middle`, the zero point. Padding is 0, which no range excludes."""
    bits, clip = int(spec.option("bits", 8)), float(spec.option("clip", 1.0))
    store = stored_lines(spec)
    if spec.option("element", "int") == "fp8":
        return [f"spread = tl.max(tl.abs(numbers), axis={axis}) * {clip / FLOAT8_LARGEST!r}", *store]
    ends = [f"greatest = tl.max(numbers, axis={axis})", f"least = tl.min(numbers, axis={axis})"]
    half = 1 << (bits - 1)
    if not asymmetric(spec):
        # The end of larger magnitude becomes the lowest code, its sign kept in the scale: one level more for the longer tail.
        return [*ends, f"spread = tl.where(greatest > -least, greatest, least) * {-clip / half!r}", *store]
    clipped = f" * {clip!r}" if clip != 1.0 else ""
    return [
        *ends,
        f"greatest = tl.maximum(greatest, 0.0){clipped}",
        f"least = tl.minimum(least, 0.0){clipped}",
        f"spread = tl.div_rn(greatest - least, {float(2 * half - 1)})",
        *store,
        *round_lines("middle", "tl.div_rn(-least, spread)", 0, 2 * half - 1),
        f"middle -= {half}",
    ]


def code_lines(spec: KernelSpec, spread: str, middle: str) -> Lines:
    """`quantized`: the codes of `numbers`, given the names of their scale and zero point as they broadcast.

    The division is rounded correctly: 16-bit numbers over a 16-bit extreme meet exact ties often, and a reciprocal would break them.
    """
    if spec.option("element", "int") == "fp8":
        largest = FLOAT8_LARGEST
        return [f"quantized = tl.minimum(tl.maximum(tl.div_rn(numbers, {spread}), -{largest}), {largest}).to(tl.float8e4nv)"]
    half = 1 << (int(spec.option("bits", 8)) - 1)
    if not middle:
        return [*round_lines("quantized", f"tl.div_rn(numbers, {spread})", -half, half - 1), "quantized = quantized.to(tl.int8)"]
    return [
        *round_lines("quantized", f"tl.div_rn(numbers, {spread})", 1 - 2 * half, 2 * half - 1),
        f"quantized = tl.minimum(tl.maximum(quantized + {middle}, {-half}), {half - 1}).to(tl.int8)",
    ]


def quantize_lines(spec: KernelSpec, row: Row) -> Lines:
    """Codes, scales and zero points of `wide` at `column`, `inside`, stored."""
    size, groups = groups_of(spec)
    names = results(spec)
    middle = "middle" if "zero" in names else ""
    store = [f"tl.store({names['codes']} + row * K + column, quantized, mask=inside)"]
    parts = {"scale": "spread", **({"zero": "middle"} if middle else {})}
    if not size:
        stores = [f"tl.store({names[name]} + row, {value})" for name, value in parts.items()]
        return ["numbers = wide", *range_lines(spec, 0), *code_lines(spec, "spread", middle), *store, *stores]
    return [
        "numbers = tl.reshape(wide, [HELD // GROUP, GROUP])",
        *range_lines(spec, 1),
        *code_lines(spec, "spread[:, None]", middle and "middle[:, None]"),
        "quantized = tl.reshape(quantized, [HELD])",
        *store,
        *group_lines(row),
        *(f"tl.store({names[name]} + row * {groups} + group, {value}, mask=present)" for name, value in parts.items()),
    ]


def group_lines(row: Row) -> Lines:
    """`group`, `present` of the scales [HELD // GROUP]."""
    if not row.scattered:
        return ["group = tl.arange(0, HELD // GROUP)", "present = group * GROUP < K"]
    return [
        "first = tl.arange(0, HELD // GROUP) * GROUP",
        "group = (first // (SIDE * TWOS) * SIZE + first % (SIDE * TWOS)) // GROUP",
        "present = (first % (SIDE * TWOS) < SIZE) & (first // (SIDE * TWOS) < BLOCKS)",
    ]


def emit_rows(spec: KernelSpec, arch: Architecture) -> Kernel:
    """One program a row: its source, its rotation, and its codes, or the rotated row itself."""
    row, source = row_of(spec), row_source(spec)
    numbers = row_constants(row)
    kind = TRITON_TYPES[stored(spec, "gate" if spec.format("gate") else "x")]
    if spec.operator == "hadamard":
        finish = [f"tl.store(out + row * K + column, wide.to({TRITON_TYPES[stored(spec, 'out')]}), mask=inside)"]
        outputs = ["out"]
    else:
        finish, outputs = quantize_lines(spec, row), list(results(spec).values())
        if groups_of(spec)[0]:
            numbers["GROUP"] = (groups_of(spec)[0], "columns that share a scale")
    body = [*constants(numbers), "row = tl.program_id(0).to(tl.int64)", *rotate_lines(row, source, kind), *finish]
    parameters = (*source_parameters(spec), *(pointer(name, stored(spec, name)) for name in outputs), *stride_parameters(spec))
    doc = "One program holds one row in registers, in float32."
    functions = [*helpers(row, source), function(spec.operator, [parameter.name for parameter in parameters], doc, body)]
    launch = Launch(spec.operator, ("rows", 1, 1), parameters, (), row_warps(row.held))
    # Eight numbers of 16 bits are the widest load there is; rows and halves of rows begin at a multiple of it.
    wide = not row.mixed and row.columns % 16 == 0 and row.held >= 8 * 32 * launch.num_warps
    return kernel(spec, arch, functions, [launch], expects=("load128",) if wide else ())


def emit_static(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Codes by one scale and zero point for the whole tensor."""
    zero = ["middle = tl.load(zero).to(tl.int32)"] if spec.format("zero") else []
    body = [
        *constants({"K": (spec.size("K"), "columns"), "BLOCK": (1024, "numbers of a program")}),
        "at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "inside = at < rows.to(tl.int64) * K",
        "spread = tl.load(scale).to(tl.float32)",
        *zero,
        "numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)",
        *code_lines(spec, "spread", "middle" if zero else ""),
        "tl.store(out + at, quantized, mask=inside)",
    ]
    names = ("x", "scale", *(["zero"] if zero else []), "out")
    parameters = (*(pointer(name, stored(spec, name)) for name in names), integer("rows"))
    grid = (("ceildiv", ("mul", "rows", spec.size("K")), 1024), 1, 1)
    doc = "One program rounds BLOCK numbers."
    return kernel(spec, arch, [function(spec.operator, [p.name for p in parameters], doc, body)], [Launch(spec.operator, grid, parameters)])


CODES = ("i8", "fp8e4nv")
_RANGE = ("bits", "clip", "element", "group_size")
_NORM = ("eps", "offset")


def _rows(
    sources: dict[str, tuple[str, ...]], outputs: tuple[tuple[str, ...], ...], options: tuple[str, ...], required: tuple[str, ...]
) -> Operator:
    """An operator that quantizes rows: what it reads, what its results are stored in, and its options beside the range's."""
    named = {f"out{place or ''}": kinds for place, kinds in enumerate(outputs)}
    return Operator(
        emit=emit_rows,
        operands={**sources, **named},
        optional=frozenset({"weight", "matrix"}),
        sizes=("K",),
        options=(*_RANGE, *options),
        required=("bits", "group_size", *required),
        refuses=refuses_quantize,
    )


_SCALES = ("fp32", "fp16")
_QUANTIZED = (CODES, _SCALES)
_ASYMMETRIC = (("i8",), _SCALES, ("i32",))
_ROTATION = {"matrix": ("fp32",)}
_NORMED = {"x": HALVES, "weight": FLOATS, **_ROTATION}
_SUMMED = {"x": HALVES, "residual": HALVES, "weight": FLOATS, **_ROTATION}
_GATED = {"gate": HALVES, "up": HALVES, **_ROTATION}

HADAMARD = Operator(
    emit=emit_rows,
    operands={"x": HALVES, **_ROTATION, "out": HALVES},
    optional=frozenset({"matrix"}),
    sizes=("K",),
    options=("hadamard_size",),
    required=("hadamard_size",),
    refuses=lambda spec: same_storage(spec, "x", "out") or refuses_row(spec),
)
QUANTIZE_ACTIVATION = _rows({"x": HALVES}, _QUANTIZED, (), ())
QUANTIZE_ACTIVATION_ASYM = _rows({"x": HALVES}, _ASYMMETRIC, (), ())
HADAMARD_QUANTIZE = _rows({"x": HALVES, **_ROTATION}, _QUANTIZED, ("hadamard_size",), ())
HADAMARD_QUANTIZE_ASYM = _rows({"x": HALVES, **_ROTATION}, _ASYMMETRIC, ("hadamard_size",), ())
NORM_QUANTIZE = _rows(_NORMED, _QUANTIZED, ("hadamard_size", *_NORM), ("eps",))
NORM_QUANTIZE_ASYM = _rows(_NORMED, _ASYMMETRIC, ("hadamard_size", *_NORM), ("eps",))
ADD_NORM_QUANTIZE = _rows(_SUMMED, (HALVES, *_QUANTIZED), ("hadamard_size", *_NORM), ("eps",))
ADD_NORM_QUANTIZE_ASYM = _rows(_SUMMED, (HALVES, *_ASYMMETRIC), ("hadamard_size", *_NORM), ("eps",))
GATED_QUANTIZE = _rows(_GATED, _QUANTIZED, ("hadamard_size", "activation"), ("activation",))
GATED_QUANTIZE_ASYM = _rows(_GATED, _ASYMMETRIC, ("hadamard_size", "activation"), ("activation",))
QUANTIZE_STATIC = Operator(
    emit=emit_static,
    operands={"x": HALVES, "scale": ("fp32",), "zero": ("i32",), "out": CODES},
    optional=frozenset({"zero"}),
    sizes=("K",),
    options=("bits", "element"),
    required=("bits",),
    refuses=refuses_quantize,
)
