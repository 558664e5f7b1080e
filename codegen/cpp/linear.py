"""Linear layers over quantized weights: these lie in tiles of 16 rows, so that 16 results are one vector and no sum crosses lanes.

The same function serves one row and many: it reads a word of codes once, and multiplies what it stands for with `ROWS` rows of x.
A result is the sum over groups of scale times the sum of the group's products, in the order of the columns.
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.source import Lines, block, call, constants, function, when
from qcompile.codegen.cpp.weights import MOST_GROUPS, Weight, refuses_weight, weight_of
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

MOST_COLUMNS = 1 << 15
"""Of rows in halves: some of them stand on the stack as floats."""
AS_FLOATS = [
    *function(
        "static inline const float* as_floats",
        ["const float* from", "int64_t", "float*", "int64_t"],
        "A row of numbers as floats, as it lies.",
        ["return from;"],
    ),
    *function(
        "template <class Real>\nstatic inline const float* as_floats",
        ["const Real* from", "int64_t columns", "float* room", "int64_t place"],
        "A row of numbers as floats, widened into the room from `place` on.",
        [
            "room += place;",
            "int64_t column = 0;",
            "for (; column + LANES <= columns; column += LANES) store(room + column, load(from + column));",
            "if (column < columns) store(room + column, load(from + column, columns - column), columns - column);",
            "return room;",
        ],
    ),
]


def product_function(weight: Weight) -> Lines:
    """`total` = ROWS rows of x times TILES tiles of a weight of this format."""
    per, group = weight.per_word, weight.group
    first_word = "column" if per == 1 else f"column / {per}"
    at = f"(t * words + {first_word}) * TILE + p * LANES"
    whole = [
        f"{weight.vector} word[TILES][PARTS];",
        *_every_part([f"word[t][p] = load_bits<{weight.vector}>(codes + {at});"]),
        *block(
            f"UNROLL for (int place = 0; place < {per}; place++)",
            [
                "Floats weight[TILES][PARTS];",
                *_every_part([f"weight[t][p] = {weight.name}_code(word[t][p], place);"]),
                *block(
                    "UNROLL for (int r = 0; r < ROWS; r++)",
                    [
                        "const Floats value = splat(x[r][column + place]);",
                        *_every_part(["part[r][t][p] = fma(weight[t][p], value, part[r][t][p]);"]),
                    ],
                ),
            ],
        ),
    ]
    single = [
        f"const auto word = load_bits<{weight.vector}>(codes + {at});",
        f"const Floats weight = {weight.name}_code(word, column % {per});",
        "UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = fma(weight, splat(x[r][column]), part[r][t][p]);",
    ]
    last = "columns" if group == 0 else f"std::min<int64_t>(columns, (group + 1) * {group})"
    body = [
        f"const int64_t words = {'columns' if per == 1 else f'(columns + {per - 1}) / {per}'};",
        f"const int64_t groups = {'1' if group == 0 else f'(columns + {group - 1}) / {group}'};",
        *block(
            "for (int64_t group = 0; group < groups; group++)",
            [
                f"const int64_t last = {last};",
                f"int64_t column = group * {group};",
                *_start(weight),
                *when(group % per, block(f"for (; column < last && column % {per}; column++)", _every_part(single))),
                *block(f"for (; column + {per} <= last; column += {per})", whole),
                *when(per > 1, block("for (; column < last; column++)", _every_part(single))),
                *_finish(weight),
            ],
        ),
    ]
    sums = ["const float* sums"] * weight.zero
    parameters = ["const float* const* x", f"const {weight.word}* codes", *weight.scale_parameters, *sums, "int64_t columns"]
    head = f"template <int ROWS, int TILES>\nstatic inline void {weight.name}_product"
    return function(head, [*parameters, "Floats (&total)[ROWS][TILES][PARTS]"], f"ROWS rows of x times TILES tiles of {weight.text}.", body)


def _every_part(lines: Lines) -> Lines:
    """The lines for every vector of every tile."""
    return block("UNROLL for (int t = 0; t < TILES; t++)", block("UNROLL for (int p = 0; p < PARTS; p++)", lines))


def _start(weight: Weight) -> Lines:
    """The sums of a group begin with what its zero point takes off."""
    if not weight.zero:
        return ["Floats part[ROWS][TILES][PARTS] = {};"]
    offset = f"load_zero(zero + (t * {weight.zero_stride} + group) * TILE + p * LANES, {weight.middle}.0f)"
    body = [
        f"const Floats offset = {offset};",
        "UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = splat(-sums[r * groups + group]) * offset;",
    ]
    return ["Floats part[ROWS][TILES][PARTS];", *_every_part(body)]


def _sums(weight: Weight) -> Lines:
    """The sums of each group of x, which every tile wants: zero points are taken off by them."""
    group = weight.group or "columns"
    return [
        f"float sums[ROWS * {MOST_GROUPS}];",
        *block(
            "for (int64_t group = 0; group < groups; group++)",
            [
                f"const int64_t first = group * {group}, count = std::min<int64_t>({group}, columns - first);",
                "for (int r = 0; r < ROWS; r++) sums[r * groups + group] = sum(from[r] + first, count);",
            ],
        ),
    ]


def _finish(weight: Weight) -> Lines:
    """The group's sums join the totals, times its scale."""
    if not weight.scale:
        return _every_part(["UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] += part[r][t][p];"])
    body = [
        "const Floats factor = load(scale + (t * groups + group) * TILE + p * LANES);",
        "UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] = fma(factor, part[r][t][p], total[r][t][p]);",
    ]
    return _every_part(body)


def rows_function(weight: Weight) -> Lines:
    """ROWS rows of x from `row` on times the tiles of a range, and what comes after the sum."""
    names = [name for name, _ in weight.scale_strides]
    rest = ["x", "codes", *names, "bias", "out", "row", "Range{tile, tiles.last}", "rows", "columns", "room"]
    shares = [f"{name} + tile * {stride} * TILE" for name, stride in weight.scale_strides]
    given = ["from", "codes + tile * words * TILE", *shares, *["sums"] * weight.zero, "columns", "total"]
    body = [
        "const float* from[ROWS];",
        "UNROLL for (int r = 0; r < ROWS; r++) from[r] = as_floats(x.row<Real>(row + r), columns, room, r * columns);",
        *weight.stride_constants,
        *(_sums(weight) if weight.zero else []),
        "int64_t tile = tiles.first;",
        *block(
            "for (; tile + TILES <= tiles.last; tile += TILES)",
            [
                "Floats total[ROWS][TILES][PARTS] = {};",
                *call(f"{weight.name}_product<ROWS, TILES>", given),
                *_every_part(
                    [
                        "const int64_t first = (tile + t) * TILE + p * LANES;",
                        "const int64_t count = std::min<int64_t>(LANES, rows - first);",
                        "if (count <= 0) continue;",
                        "if (bias) UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] += load(bias + first, count);",
                        "UNROLL for (int r = 0; r < ROWS; r++) store(out.row<Real>(row + r) + first, total[r][t][p], count);",
                    ]
                ),
            ],
        ),
        *block("if constexpr (TILES > 1)", call(f"{weight.name}_rows<ROWS, TILES / 2>", rest)),
    ]
    parameters = [
        "const Tensor& x", f"const {weight.word}* codes", *weight.scale_parameters, "const Real* bias", "const Tensor& out", "int64_t row",
        "Range tiles", "int64_t rows", "int64_t columns", "float* room",
    ]  # fmt: skip
    head = f"template <int ROWS, int TILES, class Real>\nstatic void {weight.name}_rows"
    return function(head, parameters, f"ROWS rows of x times a range of tiles of {weight.text}, stored.", body)


def emit_linear(spec: KernelSpec) -> Kernel:
    """`x Wᵀ + b`: one row by itself, or blocks of rows over tiles that stay near."""
    single = BUCKETS[spec.bucket][1] == 1
    if not single:
        spec = replace(spec, bucket="m2-63")  # one kernel for any number of rows but one
    weight = weight_of(spec)
    pointers = [f"{name}.at<{type_of(spec, name)}>()" for name, _ in weight.scale_strides]
    real = type_of(spec, "x")
    pointers = [f"codes.at<{weight.word}>()", *pointers, f"bias.at<{real}>()" if spec.format("bias") else f"static_cast<{real}*>(nullptr)"]
    body = [
        *constants({"rows": (spec.size("N"), "of the weight"), "columns": (spec.size("K"), "of the weight and of x")}),
        "float* room = nullptr;  // rows are floats" if real == "float" else f"float room[{'1' if single else 'MANY'} * columns];",
        "const Range mine = team.share((rows + TILE - 1) / TILE);",
        *(_one_row(weight, pointers) if single else _many_rows(weight, pointers)),
    ]
    layouts = {"codes": f"tiles-int{weight.bits}", "scale": "tiles", "zero": weight.zero_layout}
    names = QUANTIZED_LINEAR.present(spec)
    helpers = [*weight.helpers, AS_FLOATS, product_function(weight), rows_function(weight)]
    return kernel(spec, names, body, helpers, [(name, layouts[name]) for name in names if name in layouts])


def _one_row(weight: Weight, pointers: list[str]) -> Lines:
    return call(f"{weight.name}_rows<1, SINGLE_WIDE>", ["x", *pointers, "out", "0", "mine", "rows", "columns", "room"])


def _many_rows(weight: Weight, pointers: list[str]) -> Lines:
    given = ["x", *pointers, "out", "row", "near", "rows", "columns", "room"]
    blocks: Lines = []
    for count in (8, 4, 2):
        made = block(f"if (left >= {count})", [*call(f"{weight.name}_rows<{count}, WIDE>", given), f"row += {count};", "continue;"])
        blocks += block(f"if constexpr (MANY >= {count})", made) if count > 2 else made
    blocks += [*call(f"{weight.name}_rows<1, WIDE>", given), "row += 1;"]
    return [
        f"constexpr int64_t tile_bytes = (columns * {weight.bits} + 7) / 8 * TILE;",
        "constexpr int64_t step = std::max<int64_t>(WIDE, NEAR_BYTES / tile_bytes / WIDE * WIDE);",
        *block(
            "for (int64_t first = mine.first; first < mine.last; first += step)",
            [
                "const Range near{first, std::min(first + step, mine.last)};",
                *block(
                    "for (int64_t row = 0, count = x.rows(); row < count;)",
                    ["const int64_t left = count - row;", *blocks],
                ),
            ],
        ),
    ]


def refuses_linear(spec: KernelSpec) -> str | None:
    """Formats that no function reads, and rows in halves that do not fit on the stack as floats."""
    if spec.size("K") > MOST_COLUMNS and spec.format("x") != "fp32":
        return f"K={spec.size('K')}: expected at most {MOST_COLUMNS} columns of {spec.format('x')}"
    return same_storage(spec, "x", "bias", "out") or refuses_weight(spec)


_BUCKETS = tuple(BUCKETS)

QUANTIZED_LINEAR = Operator(
    emit=emit_linear,
    operands={"x": FLOATS, "codes": (), "scale": FLOATS, "zero": ("uint8",), "bias": FLOATS, "out": FLOATS},
    optional=frozenset({"bias", "zero"}),
    sizes=("K", "N"),
    buckets=_BUCKETS,
    refuses=refuses_linear,
)
