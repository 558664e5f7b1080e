"""Activations to codes and scales, alone or in one kernel with what makes and rotates the row: threads share the rows.

Scales, zero points and codes are those of `qcompile.quant.activations` bit for bit, given the same row.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel
from qcompile.codegen.cpp.elementwise import BODIES
from qcompile.codegen.cpp.loops import EVERY_VECTOR, every_row, row_pointer, vectors
from qcompile.codegen.cpp.rows import kept, refuses_row, row_constants, row_helpers, row_lines, row_of
from qcompile.codegen.cpp.source import Lines, block, constants, function, number, when
from qcompile.ir.lowered import Kernel, KernelSpec
from qcompile.quant.activations import HALF_LEAST, HALF_MAX

_FAR = 1 << 20
"""Codes are rounded within it before a zero point is added: far beyond any range, and every sum exact."""
_AT_MOST = function(
    "static inline Floats at_most", ["Floats a", "Floats b"], "The smaller lanes, those of b where neither is.",
    [
        "#if defined(__AVX512F__)", "return _mm512_min_ps(a, b);", "#elif defined(__AVX2__)", "return _mm256_min_ps(a, b);", "#else",
        "return choose(a < b, a, b);", "#endif",
    ],
)  # fmt: skip
_ROUNDED = function(
    "static inline Ints rounded", ["Floats x", "float low", "float high"],
    "The whole numbers nearest to x within bounds below 2^22; ties go to the even one.",
    [
        "x = at_most(largest(x, splat(low)), splat(high));",
        "// What is added to 1.5 * 2^23 has no fraction left, and its low bits are the number.",
        "const Floats magic = splat(0x1.8p23f);",
        "return reinterpret_cast<Ints>(x + magic) - reinterpret_cast<Ints>(magic);",
    ],
)  # fmt: skip
_SHIFTED = function(
    "static inline Ints shifted", ["Ints codes", "int zero", "int low", "int high"], "Codes moved by a zero point, within bounds.",
    [
        "codes += zero;",
        "const Ints below = codes < low, above = codes > high;",
        "return (below & low) | (above & high) | (~below & ~above & codes);",
    ],
)  # fmt: skip
_STORE = function(
    "static inline void store_codes", ["int8_t* to", "Ints codes", "int64_t count"], "Codes as bytes.",
    [
        "typedef int8_t Narrow __attribute__((vector_size(LANES)));",
        "const Narrow bytes = __builtin_convertvector(codes, Narrow);",
        "std::memcpy(to, &bytes, count);",
    ],
)  # fmt: skip
_HALF = function(
    "static inline Floats stored_half", ["Floats scale"], "A scale as 16 bits hold it: to nearest, moved into their range.",
    [
        "const Ints bits = reinterpret_cast<Ints>(scale), size = bits & 0x7fffffff;",
        f"const Floats inside = at_most(largest(reinterpret_cast<Floats>(size), splat({number(HALF_LEAST)})), splat({number(HALF_MAX)}));",
        "return as_stored<fp16>(reinterpret_cast<Floats>(reinterpret_cast<Ints>(inside) | (bits & ~0x7fffffff)));",
    ],
)  # fmt: skip


def asymmetric(spec: KernelSpec) -> bool:
    """Whether codes have zero points."""
    return spec.operator.endswith("_asym")


def results(spec: KernelSpec) -> dict[str, str]:
    """What each result is -> its operand."""
    names = ["sum"] * (spec.format("residual") is not None) + ["codes", "scale"] + ["zero"] * asymmetric(spec)
    return {name: f"out{place or ''}" for place, name in enumerate(names)}


def refuses_quantize(spec: KernelSpec) -> str | None:
    """Codes of another element, scales of another storage, activations that have no function, rows that do not fit."""
    bits, element, group = int(spec.option("bits")), spec.option("element", "int"), int(spec.option("group_size", -1))
    if element != "int" or not 2 <= bits <= 8:
        return f"codes are {element} of {bits} bits: expected int of 2 to 8"
    if group < 1 and group != -1:
        return f"group_size={group}: expected a positive number, or -1 for the row"
    scale, wanted = spec.format(results(spec)["scale"]), "fp32" if group == -1 else "fp16"
    if spec.operator != "quantize_static" and scale != wanted:
        return f"{results(spec)['scale']} is {scale}: expected {wanted} for the scale of {'a row' if group == -1 else 'groups'}"
    if spec.format("gate") and spec.option("activation") not in BODIES:
        return f"activation {spec.option('activation')!r}: expected one of {', '.join(BODIES)}"
    return same_storage(spec, "x", "residual", "gate", "up") or refuses_row(spec)


def _range(spec: KernelSpec) -> Lines:
    """`spread`, the scale of a group in every lane, from `greatest` and `least`; for asymmetric codes also `middle`, the zero point.

    Vectors of one number: which end of a range is the longer one is no branch that a processor could foresee.
    """
    bits, clip = int(spec.option("bits")), float(spec.option("clip", 1.0))
    half, whole = 1 << (bits - 1), int(spec.option("group_size")) == -1
    store = ["spread = choose(spread == 0.0f, splat(1.0f), spread);", *when(not whole, ["spread = stored_half(spread);"])]
    if not asymmetric(spec):
        # The end of larger magnitude becomes the lowest code, its sign kept in the scale: one level more for the longer tail.
        return [f"Floats spread = choose(greatest > -least, greatest, least) * splat({number(-clip / half)});", *store]
    return [
        *when(clip != 1.0, [f"greatest *= splat({number(clip)});", f"least *= splat({number(clip)});"]),
        f"Floats spread = (greatest - least) / splat({number(2 * half - 1)});",
        *store,
        f"const int middle = rounded(-least / spread, 0.0f, {number(2 * half - 1)})[0] - {half};",
    ]


def _codes(spec: KernelSpec, value: str, zero: bool) -> str:
    """The codes of a vector, by `spread` and `middle`."""
    half = 1 << (int(spec.option("bits")) - 1)
    if not zero:
        return f"rounded({value} / spread, {number(-half)}, {number(half - 1)})"
    return f"shifted(rounded({value} / spread, {number(-_FAR)}, {number(_FAR)}), middle, {-half}, {half - 1})"


def _quantize(spec: KernelSpec) -> Lines:
    """Codes, scales and zero points of the finished row, stored."""
    name, places = row_of(spec).name, results(spec)
    value, whole = f"load({name} + column, count)", int(spec.option("group_size")) == -1
    value = kept(spec, value) if row_of(spec).size else value
    zero = asymmetric(spec)
    return [
        f"int8_t* codes_row = {places['codes']}.row<int8_t>(row);",
        f"{'float' if whole else 'fp16'}* scale_row = {places['scale']}.row<{'float' if whole else 'fp16'}>(row);",
        *when(zero, [f"int32_t* zero_row = {places.get('zero')}.row<int32_t>(row);"]),
        *block(
            "for (int64_t group = 0; group < groups; group++)",
            [
                "const int64_t first = group * group_columns, last = std::min(columns, first + group_columns);",
                "// Every range holds 0, which changes neither the longer end nor an asymmetric range.",
                "Floats high{}, low{};  // and the negative of the least",
                *vectors(
                    [f"const Floats value = {value};", "high = largest(high, value);", "low = largest(low, -value);"], "first", "last"
                ),
                "Floats greatest = splat(largest(high)), least = splat(-largest(low));",
                *_range(spec),
                *vectors([f"store_codes(codes_row + column, {_codes(spec, value, zero)}, count);"], "first", "last"),
                "store(scale_row + group, spread, 1);",
                *when(zero, ["zero_row[group] = middle;"]),
            ],
        ),
    ]


def emit_rows(spec: KernelSpec) -> Kernel:
    """Rows from their source over their rotation to codes."""
    group = int(spec.option("group_size"))
    size = spec.size("K") if group == -1 else min(group, spec.size("K"))
    numbers = {"group_columns": (size, "that share a scale"), "groups": (-(-spec.size("K") // size), "of a row")}
    body = [
        *row_constants(row_of(spec)),
        *constants(numbers),
        *every_row([*row_lines(spec), *_quantize(spec)], f"{results(spec)['codes']}.rows()"),
    ]
    helpers = [*row_helpers(spec), _AT_MOST, _ROUNDED, *([_SHIFTED] if asymmetric(spec) else []), _STORE, *([] if group == -1 else [_HALF])]
    return kernel(spec, OPERATORS[spec.operator].present(spec), body, helpers)


def emit_hadamard(spec: KernelSpec) -> Kernel:
    """Rotated rows."""
    row = row_of(spec)
    copy = vectors([f"store(to + column, load({row.name} + column), count);"])
    body = [*row_constants(row), *every_row([*row_lines(spec), row_pointer(spec, "out", "to"), *copy])]
    return kernel(spec, OPERATORS[spec.operator].present(spec), body, row_helpers(spec))


def emit_static(spec: KernelSpec) -> Kernel:
    """Codes by one scale and zero point for the whole tensor."""
    zero = spec.format("zero") is not None
    body = [
        *constants({"columns": (spec.size("K"), "of a row")}),
        "const Floats spread = splat(*scale.at<float>());",
        *when(zero, ["const int middle = *zero.at<int32_t>();"]),
        *every_row(
            [
                row_pointer(spec, "x", "from"),
                "int8_t* codes_row = out.row<int8_t>(row);",
                *vectors([f"store_codes(codes_row + column, {_codes(spec, 'load(from + column, count)', zero)}, count);"]),
            ]
        ),
    ]
    helpers = [EVERY_VECTOR, _AT_MOST, _ROUNDED, *([_SHIFTED] if zero else []), _STORE]
    return kernel(spec, OPERATORS[spec.operator].present(spec), body, helpers)


_RANGE = ("bits", "clip", "element", "group_size")
_NORM = ("eps", "offset")
_SCALES = ("fp32", "fp16")
_MATRIX = {"matrix": ("fp32",)}


def _rows(sources: Mapping[str, tuple[str, ...]], options: tuple[str, ...], required: tuple[str, ...], zero: bool) -> Operator:
    """An operator that quantizes rows: what it reads, its options beside the range's, and whether codes have zero points."""
    kinds = [*([FLOATS] if "residual" in sources else []), ("i8",), _SCALES, *([("i32",)] if zero else [])]
    return Operator(
        emit=emit_rows,
        operands={**sources, **{f"out{place or ''}": kind for place, kind in enumerate(kinds)}},
        optional=frozenset({"weight", "matrix"}),
        sizes=("K",),
        options=(*_RANGE, *options),
        required=("bits", "group_size", *required),
        refuses=refuses_quantize,
    )


def _producers() -> dict[str, Operator]:
    x, normed = {"x": FLOATS}, {"x": FLOATS, "weight": FLOATS, **_MATRIX}
    summed = {"x": FLOATS, "residual": FLOATS, "weight": FLOATS, **_MATRIX}
    gated = {"gate": FLOATS, "up": FLOATS, **_MATRIX}
    rotated = ("hadamard_size",)
    made = {}
    for ending in ("", "_asym"):
        zero = bool(ending)
        made[f"quantize_activation{ending}"] = _rows(x, (), (), zero)
        made[f"hadamard_quantize{ending}"] = _rows({**x, **_MATRIX}, rotated, rotated, zero)
        made[f"norm_quantize{ending}"] = _rows(normed, (*rotated, *_NORM), ("eps",), zero)
        made[f"add_norm_quantize{ending}"] = _rows(summed, (*rotated, *_NORM), ("eps",), zero)
        made[f"gated_quantize{ending}"] = _rows(gated, (*rotated, "activation"), ("activation",), zero)
    return made


OPERATORS: dict[str, Operator] = {
    **_producers(),
    "hadamard": Operator(
        emit=emit_hadamard, operands={"x": FLOATS, **_MATRIX, "out": FLOATS}, optional=frozenset({"matrix"}), sizes=("K",),
        options=("hadamard_size",), required=("hadamard_size",), refuses=refuses_row,
    ),
    "quantize_static": Operator(
        emit=emit_static, operands={"x": FLOATS, "scale": ("fp32",), "zero": ("i32",), "out": ("i8",)}, optional=frozenset({"zero"}),
        sizes=("K",), options=("bits", "element"), required=("bits",), refuses=refuses_quantize,
    ),
}  # fmt: skip
