"""Rows on their way to codes: where their numbers come from, and the Hadamard rotation of a row that stands on the stack.

`numbers` is a row of `held` floats: `columns` of them, zeros up to a multiple of 16. Sources are the operators of `norm.py` and
`elementwise.py` in the same arithmetic, so that a fused kernel gives the bits of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.cpp.contract import type_of
from qcompile.codegen.cpp.elementwise import activation_function
from qcompile.codegen.cpp.loops import EVERY_VECTOR, pointer, row_pointer, vectors
from qcompile.codegen.cpp.source import Lines, block, constants, function, number, when
from qcompile.ir.lowered import KernelSpec

MOST_COLUMNS = 1 << 16
"""Of a row: two of them stand on the stack as floats."""
_TURN = function(
    "static inline Floats turn", ["Floats value", "int step"],
    "Sums and differences of the lanes that are `step` apart, a power of two.",
    [
        "Ints lane;",
        "UNROLL for (int place = 0; place < LANES; place++) lane[place] = place;",
        "#if defined(__AVX512F__)",
        "const Floats other = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(lane ^ step), value);",
        "#elif defined(__AVX2__)",
        "const Floats other = _mm256_permutevar8x32_ps(value, reinterpret_cast<__m256i>(lane ^ step));",
        "#else",
        "Floats other;",
        "UNROLL for (int place = 0; place < LANES; place++) other[place] = value[place ^ step];",
        "#endif",
        "return other + choose((lane & step) != 0, -value, value);",
    ],
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of `columns` columns in blocks of `size` = `order`·2^k channels; `size` 0 means that nothing is rotated."""

    columns: int
    size: int
    order: int

    @property
    def twos(self) -> int:
        """2^k, the length of a run that butterflies transform."""
        return self.size // self.order if self.size else 1

    @property
    def held(self) -> int:
        """Floats that are kept of a row."""
        return -(-self.columns // 16) * 16

    @property
    def name(self) -> str:
        """The array that the finished row is in."""
        return "mixed" if self.size and self.order > 1 else "numbers"


def row_of(spec: KernelSpec) -> Row:
    """The row of a specification that is not refused."""
    return Row(spec.size("K"), int(spec.option("hadamard_size", 0)), dict(spec.sizes).get("M", 1))


def refuses_row(spec: KernelSpec) -> str | None:
    """Rows longer than the stack allows, and rotations that do not fit the row or the matrix."""
    row = row_of(spec)
    if row.columns > MOST_COLUMNS:
        return f"K={row.columns}: expected at most {MOST_COLUMNS} columns, a thread keeps a row on its stack"
    if (spec.format("matrix") is not None) != (row.order > 1):
        return f"matrix is {spec.format('matrix')}: expected {'one' if row.order > 1 else 'none'} for M={row.order}"
    if row.size == 0:
        return f"hadamard_size=0 with a matrix of order {row.order}: expected no matrix" if row.order > 1 else None
    if row.size < 0 or row.columns % row.size:
        return f"hadamard_size={row.size}: expected a divisor of K={row.columns}"
    if row.size % row.order or row.twos & (row.twos - 1):
        return f"hadamard_size={row.size}: expected M={row.order} times a power of two"
    return None


def row_helpers(spec: KernelSpec) -> list[Lines]:
    """The functions that the lines of a row call."""
    gate = [activation_function(str(spec.option("activation")))] if spec.format("gate") else []
    return [EVERY_VECTOR, *gate, *([_TURN] if row_of(spec).twos > 1 else [])]


def row_constants(row: Row) -> Lines:
    """The compile-time numbers of a row."""
    values = {"columns": (row.columns, "of a row"), "held": (row.held, "floats kept of it")}
    if row.size:
        values |= {"size": (row.size, "channels that are rotated together"), "twos": (row.twos, "of them, by butterflies")}
    return constants(values | ({"order": (row.order, "of the matrix")} if row.name == "mixed" else {}))


def row_lines(spec: KernelSpec) -> Lines:
    """Row `row` of the sources in `numbers`, then rotated."""
    row = row_of(spec)
    return [*_source(spec), *(_rotation(row) if row.size else [])]


def _source(spec: KernelSpec) -> Lines:
    array = "alignas(64) float numbers[held];"
    if spec.format("gate"):
        value = f"{spec.option('activation')}(load(first + column, count)) * load(second + column, count)"
        pointers = [row_pointer(spec, "gate", "first"), row_pointer(spec, "up", "second")]
        return [array, *pointers, *vectors([f"store(numbers + column, {kept(spec, value)});"]), *_filled("numbers")]
    if spec.option("eps") is not None:
        return [array, *_norm(spec), *_filled("numbers")]
    return [array, row_pointer(spec, "x", "from"), *vectors(["store(numbers + column, load(from + column, count));"]), *_filled("numbers")]


def kept(spec: KernelSpec, value: str) -> str:
    """A result of one of the operators that are fused, as it would be stored."""
    kind = type_of(spec, "gate" if spec.format("gate") else "x")
    return value if kind == "float" else f"as_stored<{kind}>({value})"


def _filled(name: str) -> Lines:
    return [f"std::fill({name} + columns, {name} + held, 0.0f);"]


def _norm(spec: KernelSpec) -> Lines:
    """The root-mean-square normalization of x, or of its sum with the residual, which is stored."""
    summed, offset = spec.format("residual") is not None, float(spec.option("offset", 0.0))
    value = "load(from + column, count)" + (" + load(other + column, count)" if summed else "")
    gain = "load(gain + column, count)"
    gain = f"({gain} + splat({number(offset)}))" if offset else gain
    scaled = "load(numbers + column) * factor" + (f" * {gain}" if spec.format("weight") else "")
    return [
        row_pointer(spec, "x", "from"),
        *([row_pointer(spec, "residual", "other"), row_pointer(spec, "out", "total")] if summed else []),
        *pointer(spec, "weight", "gain"),
        "Floats squares{};",
        *vectors(
            [
                f"const Floats value = {kept(spec, value) if summed else value};",
                *when(summed, ["store(total + column, value, count);"]),
                "store(numbers + column, value);",
                "squares = fma(value, value, squares);",
            ]
        ),
        f"const Floats factor = splat(1.0f / std::sqrt(sum(squares) / columns + {number(spec.option('eps'))}));",
        *vectors([f"store(numbers + column, {kept(spec, scaled)});"]),
    ]


def _rotation(row: Row) -> Lines:
    """`(M ⊗ S_k/sqrt(2^k))` on every block: a small matrix product along one axis, k rounds of butterflies along the other."""
    return [*(_mixing() if row.name == "mixed" else []), *(_butterflies(row) if row.twos > 1 else [])]


def _mixing() -> Lines:
    sums = [
        "Floats total{};",
        "for (int64_t source = 0; source < order; source++)",
        "    total = fma(splat(factors[source]), load(from + source * twos + column, count), total);",
        "store(to + column, total, count);",
    ]
    return [
        "alignas(64) float mixed[held];",
        *block(
            "for (int64_t place = 0; place < columns / twos; place++)",
            [
                "const float *factors = matrix.at<float>(place % order), *from = numbers + place / order * size;",
                "float* to = mixed + place * twos;",
                *vectors(sums, last="twos"),
            ],
        ),
        *_filled("mixed"),
    ]


def _butterflies(row: Row) -> Lines:
    near = [
        f"Floats value = load({row.name} + column) * splat({number(row.twos**-0.5)});",
        "UNROLL for (int step = 1; step < LANES && step < twos; step *= 2) value = turn(value, step);",
        f"store({row.name} + column, value);",
    ]
    pair = [
        f"const Floats low = load({row.name} + column), high = load({row.name} + column + step);",
        f"store({row.name} + column, low + high);",
        f"store({row.name} + column + step, low - high);",
    ]
    far = block(
        "for (int64_t first = 0; first < columns; first += 2 * step)",
        block("for (int64_t column = first; column < first + step; column += LANES)", pair),
    )
    return [
        *block("for (int64_t column = 0; column < held; column += LANES)", near),
        *when(row.twos > 4, block("for (int64_t step = LANES; step < twos; step *= 2)", far)),
    ]
