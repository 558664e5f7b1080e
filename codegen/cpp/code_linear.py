"""Linear layers over quantized activations: integer products of codes over tiles of 16 rows of the weight.

A word of the weight holds codes of one row; unsigned they are multiplied with four signed codes of x at a time (VNNI's `vpdpbusd`).
With C the weight's code, Z its zero point, X the activation's code and z its zero point, a run of columns that share their scales sums to
`Σ (C - Z)(X - z) = Σ C·X - Z·Σ (X - z) - z·Σ C`: exact, so that a result is the definition's in float32 bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.code_dot import dot_helpers
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.source import Lines, block, call, constants, function, when
from qcompile.codegen.cpp.weights import Weight, refuses_weight, weight_of
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

MOST_COLUMNS = 1 << 15
"""Of a row: its products stay within 32 bits whatever the codes are, and rows of x fit on the stack."""
MOST_ROWS = 8
"""Rows of x that are multiplied together at most."""


@dataclass(frozen=True)
class Product:
    """A weight, and the codes that it is multiplied with.

    Attributes:
        weight: in tiles.
        columns: of both.
        group: columns of x that share a scale, 0 for all of a row.
        scale: C++ type of the scales of x.
        static: whether x has one scale for every row.
        zero: whether x has zero points.
    """

    weight: Weight
    columns: int
    group: int
    scale: str
    static: bool
    zero: bool

    @property
    def run(self) -> int:
        """Columns whose products are summed as integers: they share all scales."""
        return min(self.group or self.columns, self.weight.group or self.columns)

    @property
    def runs(self) -> int:
        """In a row."""
        return -(-self.columns // self.run)

    @property
    def whole(self) -> bool:
        """Whether a row is one run."""
        return self.runs == 1

    @property
    def words(self) -> int:
        """Words of a row of the weight that its runs meet; one at a border is met twice."""
        per = self.weight.per_word
        return sum(-(-min(first + self.run, self.columns) // per) - first // per for first in range(0, self.columns, self.run))

    @property
    def name(self) -> str:
        """What functions for this product begin with; those over whole rows serve any number of columns."""
        size = "" if self.whole else f"_run{self.run}"
        return f"{self.weight.name}_codes{size}{'_moved' if self.zero else ''}"

    @property
    def rows(self) -> str:
        """Sums beside each other: rows of x, and one of ones for the sum of the weight's codes."""
        return "ROWS + 1" if self.zero else "ROWS"


def _each_run(product: Product, lines: Lines) -> Lines:
    """The lines for every run, `first` to `last`; `place` counts words of x."""
    if product.whole:
        return ["const int64_t run = 0, runs = 1, first = 0, last = columns;", "int64_t place = 0;", *lines]
    body = [f"const int64_t first = run * {product.run}, last = std::min(columns, first + {product.run});", *lines]
    return [
        f"const int64_t runs = (columns + {product.run - 1}) / {product.run};",
        "int64_t place = 0;",
        *block("for (int64_t run = 0; run < runs; run++)", body),
    ]


def prepare_function(product: Product) -> Lines:
    """Rows of x as products want them: words of codes, their sums, scales and zero points."""
    bits, per = product.weight.bits, product.weight.per_word
    # Runs of whole words lie in words as the row does; others have words of their own at their borders.
    aligned = product.whole or product.run % per == 0
    fill = [f"int{bits}_words(from, {{}}, x.words + r * x.held + {{}}, x.plane);"]
    rest = [
        f"x.scales[r * runs + run] = load({_own(product, 'scale', product.scale)} + {_x_group(product)}, 1)[0];",
        *_sum_of(product),
    ]
    row = [
        f"const int8_t* from = {'r == ROWS ? nullptr : ' if product.zero else ''}codes.row<int8_t>(row + r);",
        *([fill[0].format("0, columns", "0")] if aligned else _each_run(product, _filled_run(fill[0], per))),
        *when(product.zero, ["if (r == ROWS) return;"]),
        *(_each_run(product, rest) if aligned else block("", _each_run(product, rest))),
    ]
    head = f"template <int ROWS>\nstatic void {_prepare_name(product)}"
    parameters = ["const Tensor& codes", "const Tensor& scale", *["const Tensor& zero"] * product.zero, "int64_t row", "int64_t columns"]
    body = block(f"for (int r = 0; r < {product.rows}; r++)", row)
    return function(head, [*parameters, "const CodeRows& x"], "Rows of x in words, and what belongs to each run of them.", body)


def _filled_run(fill: str, per: int) -> Lines:
    return [fill.format("first, last", "place"), f"place += (last + {per - 1}) / {per} - first / {per};"]


def _x_group(product: Product) -> str:
    """The group of x that a run lies in."""
    return f"first / {product.group}" if product.group else "0"


def _prepare_name(product: Product) -> str:
    groups = "static" if product.static else f"g{product.group}" if product.group else "row"
    return f"{product.name}_prepare_{groups}_{product.scale}"


def _own(product: Product, operand: str, kind: str) -> str:
    """Where the scales of a row of x are."""
    return f"{operand}.at<{kind}>()" if product.static else f"{operand}.row<{kind}>(row + r)"


def _sum_of(product: Product) -> Lines:
    total = "sum_codes(from + first, last - first)"
    if not product.zero:
        return [f"x.sums[r * runs + run] = {total};"]
    return [
        f"const int32_t middle = {_own(product, 'zero', 'int32_t')}[{_x_group(product)}];",
        "x.zeros[r * runs + run] = middle;",
        f"x.sums[r * runs + run] = {total} - middle * static_cast<int32_t>(last - first);",
    ]


def product_function(product: Product) -> Lines:
    """`total` = ROWS rows of x times TILES tiles of a weight of this format."""
    weight, bits = product.weight, product.weight.bits
    per = weight.per_word
    word = [
        "Ints word[TILES][PARTS];",
        *_every_part(["word[t][p] = load_bits<Ints>(codes + (t * words + word_at) * TILE + p * LANES);"]),
        *block(
            f"UNROLL for (int s = 0; s < INT{bits}_PARTS; s++)",
            [
                "Ints code[TILES][PARTS];",
                *_every_part([f"code[t][p] = int{bits}_part(word[t][p], s);"]),
                *block(
                    f"UNROLL for (int r = 0; r < {product.rows}; r++)",
                    [
                        "const Ints value = x.words[r * x.held + s * x.plane + place] - Ints{};",
                        *_every_part([f"part[r][t][p] = int{bits}_dot(code[t][p], value, part[r][t][p]);"]),
                    ],
                ),
            ],
        ),
    ]
    run = [
        f"Ints part[{product.rows}][TILES][PARTS];",
        *_every_part(_start(product)),
        *block(f"for (int64_t word_at = first / {per}; word_at * {per} < last; word_at++, place++)", word),
        *_every_part(_finish(product)),
    ]
    body = [
        f"const int64_t words = (columns + {per - 1}) / {per};",
        f"const int64_t groups = {f'(columns + {weight.group - 1}) / {weight.group}' if weight.group else '1'};",
        *_each_run(product, run),
    ]
    parameters = ["const CodeRows& x", "const int32_t* codes", *weight.scale_parameters, "int64_t columns"]
    head = f"template <int ROWS, int TILES>\nstatic inline void {product.name}_product"
    return function(
        head, [*parameters, "Floats (&total)[ROWS][TILES][PARTS]"], f"ROWS rows of codes times TILES tiles of {weight.text}.", body
    )


def _every_part(lines: Lines) -> Lines:
    return block("UNROLL for (int t = 0; t < TILES; t++)", block("UNROLL for (int p = 0; p < PARTS; p++)", lines))


def _group(product: Product) -> str:
    return f"first / {product.weight.group}" if product.weight.group else "0"


def _start(product: Product) -> Lines:
    """Sums begin with what the weight's zero point takes off."""
    weight = product.weight
    lines = [f"UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = -{weight.middle} * x.sums[r * runs + run] - Ints{{}};"]
    if weight.zero:
        # Sums of so few columns fit into 16 bits, whose products are one instruction.
        few = not product.whole and product.run * 255 < 1 << 15
        taken = "dot_pairs(offset, (-x.sums[r * runs + run] & 0xffff) - Ints{}, Ints{})" if few else "offset * -x.sums[r * runs + run]"
        at = f"zero + (t * {weight.zero_stride} + {_group(product)}) * TILE + p * LANES"
        lines = [
            f"const Ints offset = __builtin_convertvector(load_bits<Bytes>({at}), Ints);",
            f"UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = {taken};",
        ]
    return [*lines, *when(product.zero, ["part[ROWS][t][p] = Ints{};"])]


def _finish(product: Product) -> Lines:
    """The run's sums join the totals, times its scales."""
    moved = ["part[r][t][p] -= x.zeros[r * runs + run] * part[ROWS][t][p];"] * product.zero
    return [
        f"const Floats factor = load(scale + (t * groups + {_group(product)}) * TILE + p * LANES);",
        *block(
            "UNROLL for (int r = 0; r < ROWS; r++)",
            [
                *moved,
                "const Floats both = splat(x.scales[r * runs + run]) * factor;",
                "total[r][t][p] += __builtin_convertvector(part[r][t][p], Floats) * both;",
            ],
        ),
    ]


def rows_function(product: Product) -> Lines:
    """ROWS rows of x from `row` on times the tiles of a range, and what comes after the sum."""
    weight = product.weight
    names = [name for name, _ in weight.scale_strides]
    shares = [f"{name} + tile * {stride} * TILE" for name, stride in weight.scale_strides]
    given = ["x", "codes + tile * words * TILE", *shares, "columns", "total"]
    rest = ["x", "codes", *names, "bias", "out", "row", "Range{tile, tiles.last}", "rows", "columns"]
    stored = [
        "const int64_t first = (tile + t) * TILE + p * LANES;",
        "const int64_t count = std::min<int64_t>(LANES, rows - first);",
        "if (count <= 0) continue;",
        "if (bias) UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] += load(bias + first, count);",
        "UNROLL for (int r = 0; r < ROWS; r++) store(out.row<Real>(row + r) + first, total[r][t][p], count);",
    ]
    body = [
        *weight.stride_constants,
        "int64_t tile = tiles.first;",
        *block(
            "for (; tile + TILES <= tiles.last; tile += TILES)",
            ["Floats total[ROWS][TILES][PARTS] = {};", *call(f"{product.name}_product<ROWS, TILES>", given), *_every_part(stored)],
        ),
        *block("if constexpr (TILES > 1)", call(f"{product.name}_rows<ROWS, TILES / 2>", rest)),
    ]
    parameters = [
        "const CodeRows& x", "const int32_t* codes", *weight.scale_parameters, "const Real* bias", "const Tensor& out", "int64_t row",
        "Range tiles", "int64_t rows", "int64_t columns",
    ]  # fmt: skip
    head = f"template <int ROWS, int TILES, class Real>\nstatic void {product.name}_rows"
    return function(head, parameters, f"ROWS rows of codes times a range of tiles of {weight.text}, stored.", body)


def emit_integer_linear(spec: KernelSpec) -> Kernel:
    """`Σ scales · Σ codes + b`: one row by itself, or blocks of rows over tiles that stay near."""
    single = BUCKETS[spec.bucket][1] == 1
    if not single:
        spec = replace(spec, bucket="m2-63")  # one kernel for any number of rows but one
    product = product_of(spec)
    weight, most = product.weight, 1 if single else MOST_ROWS
    pointers = [f"w_{name}.at<{type_of(spec, f'w_{name}')}>()" for name, _ in weight.scale_strides]
    real = type_of(spec, "out")
    pointers = ["w_codes.at<int32_t>()", *pointers, f"bias.at<{real}>()" if spec.format("bias") else f"static_cast<{real}*>(nullptr)"]
    body = [
        *constants({"rows": (spec.size("N"), "of the weight"), "columns": (spec.size("K"), "of the weight and of x")}),
        *constants({"most": (most, "rows of x at once"), "runs": (product.runs, "of columns that share their scales")}),
        f"constexpr int64_t plane = {product.words}, held = plane * INT{weight.bits}_PARTS;",
        f"int32_t words[held * (most{' + 1' if product.zero else ''})], sums[runs * most]{', zeros[runs * most]' if product.zero else ''};",
        "float scales[runs * most];",
        f"const CodeRows some{{words, sums, {'zeros' if product.zero else 'nullptr'}, scales, held, plane}};",
        "const Range mine = team.share((rows + TILE - 1) / TILE);",
        *(_one_row(product, pointers) if single else _many_rows(product, pointers)),
    ]
    layouts = {"w_codes": "tiles-codes", "w_scale": "tiles", "w_zero": weight.zero_layout}
    names = INTEGER_LINEAR.present(spec)
    helpers = [*dot_helpers(weight.bits), _CODE_ROWS, prepare_function(product)]
    helpers += [product_function(product), rows_function(product)]
    return kernel(spec, names, body, helpers, [(name, layouts[name]) for name in names if name in layouts])


_CODE_ROWS = [
    "// Rows of codes as products want them: words, `held` a row and `plane` a part, and by row and run the sums, zero points and scales.",
    "struct CodeRows {",
    "    int32_t *words, *sums, *zeros;",
    "    float* scales;",
    "    int64_t held, plane;",
    "};",
]


def _prepare(product: Product, rows: str, row: str) -> Lines:
    zero = ["zero"] * product.zero
    return call(f"{_prepare_name(product)}<{rows}>", ["codes", "scale", *zero, row, "columns", "some"])


def _one_row(product: Product, pointers: list[str]) -> Lines:
    given = ["some", *pointers, "out", "0", "mine", "rows", "columns"]
    return ["if (mine.first == mine.last) return;", *_prepare(product, "1", "0"), *call(f"{product.name}_rows<1, SINGLE_WIDE>", given)]


def _many_rows(product: Product, pointers: list[str]) -> Lines:
    given = ["some", *pointers, "out", "row", "near", "rows", "columns"]
    blocks: Lines = []
    for count in (8, 4, 2, 1):
        made = [*_prepare(product, str(count), "row"), *call(f"{product.name}_rows<{count}, WIDE>", given), f"row += {count};"]
        taken = block(f"if (left >= {count})", [*made, "continue;"]) if count > 1 else made
        blocks += block(f"if constexpr (MANY >= {count})", taken) if count > 2 else taken
    return [
        f"constexpr int64_t tile_bytes = (columns * {product.weight.bits} + 7) / 8 * TILE;",
        "constexpr int64_t step = std::max<int64_t>(WIDE, NEAR_BYTES / tile_bytes / WIDE * WIDE);",
        *block(
            "for (int64_t first = mine.first; first < mine.last; first += step)",
            [
                "const Range near{first, std::min(first + step, mine.last)};",
                *block("for (int64_t row = 0, count = codes.rows(); row < count;)", ["const int64_t left = count - row;", *blocks]),
            ],
        ),
    ]


def _plain(spec: KernelSpec) -> KernelSpec:
    """The specification of the weight by itself, as a weight-only product names it."""
    formats = [(name.removeprefix("w_"), kind) for name, kind in spec.formats if name.startswith("w_")]
    return replace(spec, formats=tuple(sorted(formats)))


def product_of(spec: KernelSpec) -> Product:
    """The product of a specification that is not refused."""
    group, columns = int(spec.option("group_size")), spec.size("K")
    whole = group == -1 or group >= columns
    return Product(
        weight_of(_plain(spec)), columns, 0 if whole else group, type_of(spec, "scale"), bool(spec.option("static", False)),
        spec.format("zero") is not None,
    )  # fmt: skip


def refuses_integer_linear(spec: KernelSpec) -> str | None:
    """Weights that no function reads, groups that do not nest, sums that 32 bits may not hold."""
    reason = refuses_weight(_plain(spec))
    if reason is not None:
        return f"the weight's {reason}"
    if (reason := same_storage(spec, "bias", "out")) is not None:
        return reason
    product = product_of(spec)
    if product.columns > MOST_COLUMNS:
        return f"K={product.columns}: expected at most {MOST_COLUMNS} columns, whose products stay within 32 bits"
    small, large = sorted((product.group or product.columns, product.weight.group or product.columns))
    if large < product.columns and large % small:
        return f"groups of {small} and {large} columns: expected one to divide the other"
    return f"one scale for groups of {product.group} columns: expected one a group" if product.static and product.group else None


INTEGER_LINEAR = Operator(
    emit=emit_integer_linear,
    operands={
        "codes": ("i8",), "scale": ("fp32", "fp16"), "zero": ("i32",), "w_codes": (), "w_scale": FLOATS, "w_zero": ("uint8",),
        "bias": FLOATS, "out": FLOATS,
    },
    optional=frozenset({"zero", "w_zero", "bias"}),
    sizes=("K", "N"),
    options=("group_size", "static"),
    required=("group_size",),
    buckets=tuple(BUCKETS),
    refuses=refuses_integer_linear,
)  # fmt: skip
