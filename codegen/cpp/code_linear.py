"""Linear layers over quantized activations: integer products of codes over tiles of 16 rows of the weight.

Words of the weight hold codes of one row; unsigned they are multiplied with four signed codes of x at a time (VNNI's `vpdpbusd`),
which are read where they stand.
With C the weight's code, Z its zero point, X the activation's code and z its zero point, a run of columns that share their scales sums to
`Σ (C - Z)(X - z) = Σ C·X - Z·Σ (X - z) - z·Σ C`: exact, so that a result is the definition's in float32 bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.code_rows import Product, each_run, few_columns, prepare_function, prepare_name, product_of
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.packed_forms import helpers
from qcompile.codegen.cpp.source import Lines, block, call, constants, function, when
from qcompile.codegen.cpp.tiles import tile_layouts
from qcompile.codegen.cpp.weights import plain, refuses_weight
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

MOST_COLUMNS = 1 << 15
"""Of a row: its products stay within 32 bits whatever the codes are, and rows of x fit on the stack."""

MOST_CHUNKS = 4
"""Of a run that are written out one after the other."""

MOST_LINES = 4
"""Words of a block, in each of two tiles, whose followers are asked for as they are read: more at once hold up what is read."""


def product_function(product: Product) -> Lines:
    """`total` = ROWS rows of x times TILES tiles of a weight of this format."""
    weight = product.weight
    rows = f"UNROLL for (int r = 0; r < {product.rows}; r++)"
    at_once = weight.block_words <= MOST_LINES
    word = [
        f"Ints word[TILES][PARTS][{weight.block_words}];",
        *_every_part(
            _every_word(
                product,
                [
                    f"const int32_t* from = {_word(product, 'i')};",
                    f"word[t][p][{'i' if weight.block_words > 1 else 0}] = load_bits<Ints>(from);",
                    *when(at_once, [_ask("ROWS == 1", "from")]),
                ],
            )
        ),
        *block(
            "UNROLL for (int q = 0; q < Codes::QUADS; q++)",
            [
                "Ints code[TILES][PARTS];",
                *_every_part(
                    [
                        "code[t][p] = Codes::part(word[t][p], q);",
                        *when(not at_once, [_ask("ROWS == 1 && q < Codes::WORDS", _word(product, "q"))]),
                    ]
                ),
                *block(
                    rows,
                    [
                        f"const Ints value = {_value(product)};",
                        *_every_part(["near[r][t][p] = Near::dot(code[t][p], value, near[r][t][p]);"]),
                    ],
                ),
            ],
        ),
    ]
    chunk = [
        f"Ints near[{product.rows}][TILES][PARTS];",
        *_every_part([f"{rows} near[r][t][p] = Near::open(part[r][t][p]);"]),
        *block(f"UNROLL for (int b = 0; b < {product.chunk}; b++)", word),
        *_every_part([f"{rows} part[r][t][p] = Near::close(near[r][t][p], part[r][t][p]);"]),
    ]
    run = [
        f"Ints part[{product.rows}][TILES][PARTS];",
        *_every_part(_start(product)),
        *_every_chunk(product, chunk),
        *_every_part(_finish(product)),
    ]
    body = [
        f"typedef Integers<{weight.bits}> Codes;",
        f"typedef NearSum<{weight.bits}> Near;",
        *weight.stride_constants,
        *when(not product.direct, ["int64_t place = 0;"]),
        *each_run(product, run),
    ]
    parameters = ["const CodeRows& x", "const int32_t* codes", *weight.parameters, "int64_t columns", "int64_t apart"]
    head = f"template <int ROWS, int TILES>\nstatic inline void {product.name}_product"
    comment = f"ROWS rows of codes times TILES tiles, so many `apart`, of {weight.text}."
    return function(head, [*parameters, "Floats (&total)[ROWS][TILES][PARTS]"], comment, body)


def _every_chunk(product: Product, lines: Lines) -> Lines:
    """The lines for every chunk of blocks of a run, from `block_at` on; `place` counts blocks of copies of x."""
    per, step = product.weight.block, product.chunk
    if product.even and product.run == step * per:
        return [f"const int64_t block_at = first / {per};", *lines]
    until = f"last / {per}" if product.direct else f"(last + {per - 1}) / {per}"
    if product.even and product.run <= MOST_CHUNKS * step * per:
        # All at once: so short a loop costs more than what is in it.
        head = f"UNROLL for (int chunk = 0; chunk < {product.run // (step * per)}; chunk++)"
        return block(head, [f"const int64_t block_at = first / {per} + chunk * {step};", *lines])
    place = "" if product.direct else f", place += {step}"
    return block(f"for (int64_t block_at = first / {per}, until = {until}; block_at < until; block_at += {step}{place})", lines)


def _every_word(product: Product, lines: Lines) -> Lines:
    """The lines for every word i of a block."""
    words = product.weight.block_words
    return block(f"UNROLL for (int i = 0; i < {words}; i++)", lines) if words > 1 else lines


def _word(product: Product, number: str) -> str:
    """Where word `number` of block b of part p of tile t lies."""
    words = product.weight.block_words
    word = f"(block_at + b) * {words} + {number}" if words > 1 else "block_at + b"
    return f"codes + (t * apart * words + {word}) * TILE + p * LANES"


def _ask(when_true: str, word: str) -> str:
    """For the line that is so far behind a word."""
    return f"if ({when_true}) __builtin_prefetch({word} + WORDS_AHEAD);"


def _value(product: Product) -> str:
    """The word of row r that part q of block b meets."""
    at = "block_at" if product.direct else "place"
    at = f"(({at} + b) * Codes::QUADS + q) * 4"
    if not product.zero:
        return f"every_lane(x.rows[r] + {at})"
    ones = "0x01010101 - Ints{}" if product.direct else f"every_lane(x.ones + {at})"
    return f"r == ROWS ? {ones} : every_lane(x.rows[r] + {at})"


def _every_part(lines: Lines) -> Lines:
    return block("UNROLL for (int t = 0; t < TILES; t++)", block("UNROLL for (int p = 0; p < PARTS; p++)", lines))


def _group(product: Product) -> str:
    return f"first / {product.weight.group}" if product.weight.group else "0"


def _start(product: Product) -> Lines:
    """Sums begin with what the weight's zero point takes off."""
    weight = product.weight
    if weight.minimum:
        return [f"UNROLL for (int r = 0; r < {product.rows}; r++) part[r][t][p] = Ints{{}};"]
    lines = ["UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = x.sums[r * runs + run] - Ints{};"]
    if weight.zero:
        taken = "dot_pairs(offset, x.sums[r * runs + run] - Ints{}, Ints{})" if few_columns(product) else "offset * x.sums[r * runs + run]"
        at = f"zero + (t * apart * {weight.zero_stride} + {_group(product)}) * TILE + p * LANES"
        lines = [
            f"const Ints offset = lanes_of(load_bits<Bytes>({at}));",
            f"UNROLL for (int r = 0; r < ROWS; r++) part[r][t][p] = {taken};",
        ]
    return [*lines, *when(product.zero, ["part[ROWS][t][p] = Ints{};"])]


def _finish(product: Product) -> Lines:
    """The run's sums join the totals, times its scales."""
    minimum = product.weight.minimum
    at = f"(t * apart * groups + {_group(product)}) * TILE + p * LANES"
    sums = ["part[r][t][p] -= x.zeros[r * runs + run] * part[ROWS][t][p];"] * product.zero
    sums += ["const Floats products = __builtin_convertvector(part[r][t][p], Floats), own = splat(x.scales[r * runs + run]);"]
    if minimum:
        sums += ["total[r][t][p] += own * (products * factor + splat(x.totals[r * runs + run]) * least);"]
    else:
        sums += ["total[r][t][p] += products * (own * factor);"]
    return [
        f"const Floats factor = load(scale + {at});",
        *when(minimum, [f"const Floats least = load(zero + {at});"]),
        *block("UNROLL for (int r = 0; r < ROWS; r++)", sums),
    ]


def rows_function(product: Product) -> Lines:
    """ROWS rows of x, those of `out` from `row` on, times the tiles of a range, and what comes after the sum."""
    weight = product.weight
    names = [name for name, _ in weight.strides]
    shares = [f"{name} + tile * {stride} * TILE" for name, stride in weight.strides]
    given = ["x", "codes + tile * words * TILE", *shares, "columns", "apart", "total"]
    rest = ["x", "codes", *names, "bias", "out", "row", "Range{tiles.first + TILES * apart, tiles.last}", "rows", "columns"]
    stored = [
        "const int64_t first = (tile + t * apart) * TILE + p * LANES;",
        "const int64_t count = std::min<int64_t>(LANES, rows - first);",
        "if (count <= 0) continue;",
        "if (bias) UNROLL for (int r = 0; r < ROWS; r++) total[r][t][p] += load(bias + first, count);",
        "if (count == LANES) UNROLL for (int r = 0; r < ROWS; r++) store(to[r] + first, total[r][t][p]);",
        "else for (int r = 0; r < ROWS; r++) store(to[r] + first, total[r][t][p], count);",
    ]
    body = [
        *weight.stride_constants,
        "Real* to[ROWS];",
        "UNROLL for (int r = 0; r < ROWS; r++) to[r] = out.row<Real>(row + r);",
        "const int64_t apart = (tiles.last - tiles.first) / TILES;",
        *block(
            "for (int64_t tile = tiles.first; tile < tiles.first + apart; tile++)",
            ["Floats total[ROWS][TILES][PARTS] = {};", *call(f"{product.name}_product<ROWS, TILES>", given), *_every_part(stored)],
        ),
        *block("if constexpr (TILES > 1)", call(f"{product.name}_rows<ROWS, TILES / 2>", rest)),
    ]
    parameters = [
        "const CodeRows& x", "const int32_t* codes", *weight.parameters, "const Real* bias", "const Tensor& out", "int64_t row",
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
    weight = product.weight
    pointers = [f"w_{name}.at<{type_of(spec, f'w_{name}')}>()" for name, _ in weight.strides]
    real = type_of(spec, "out")
    pointers = ["w_codes.at<int32_t>()", *pointers, f"bias.at<{real}>()" if spec.format("bias") else f"static_cast<{real}*>(nullptr)"]
    body = [
        *constants({"rows": (spec.size("N"), "of the weight"), "columns": (spec.size("K"), "of the weight and of x")}),
        *_kept(product, 1 if single else product.most),
        "const Range mine = team.share((rows + TILE - 1) / TILE);",
        *(_one_row(product, pointers) if single else _many_rows(product, pointers)),
    ]
    functions = [*helpers("digits", "planes", "code_dot"), prepare_function(product), product_function(product), rows_function(product)]
    layouts = [(f"w_{name}", layout) for name, layout in tile_layouts(plain(spec))]
    return kernel(spec, INTEGER_LINEAR.present(spec), body, functions, layouts)


def _kept(product: Product, most: int) -> Lines:
    """What is kept of rows of x while the weight passes, on the stack: `some`."""
    named = {"most": (most, "rows of x at once"), "runs": (product.runs, "of columns that share their scales")}
    arrays = [f"{kind} {name}[runs * most];" for name, kind in product.kept.items()]
    if not product.direct:
        named |= {"held": (product.held, "bytes of a copied row")}
        arrays += ["int8_t copies[held * most];", *["int8_t ones[held];"] * product.zero]
    return [
        *constants(named),
        "const int8_t* at[most];",
        *arrays,
        f"const CodeRows some{{at, {_fields(product, '{}', 'copies', 'ones')}}};",
    ]


def _fields(product: Product, kept: str, copies: str, ones: str) -> str:
    """What rows of x have beside where they are, in the order of the structure; nullptr for what this product does not need."""
    named = [kept.format(name) if name in product.kept else "nullptr" for name in ("sums", "zeros", "totals", "scales")]
    copied = ["nullptr", "nullptr", "0"] if product.direct else [copies, ones if product.zero else "nullptr", "held"]
    return ", ".join([*named, *copied])


def _prepare(product: Product, row: str, count: str) -> Lines:
    zero = ["zero"] * product.zero
    return call(prepare_name(product), ["codes", "scale", *zero, row, count, "columns", "some"])


def _one_row(product: Product, pointers: list[str]) -> Lines:
    """Two tiles at a time, from either half of the range: each half is read as it lies in memory, and two streams wait less than one."""
    given = ["some", *pointers, "out", "0", "mine", "rows", "columns"]
    return ["if (mine.first == mine.last) return;", *_prepare(product, "0", "1"), *call(f"{product.name}_rows<1, 2>", given)]


def _many_rows(product: Product, pointers: list[str]) -> Lines:
    """Blocks of rows, and for each of them all tiles, as many at a time as stay near."""
    given = ["x", *pointers, "out", "begin + row", "near", "rows", "columns"]
    blocks: Lines = []
    for count in (4, 2, 1):
        made = [*call(f"{product.name}_rows<{count}, WIDE>", given), f"row += {count};"]
        taken = block(f"if (here - row >= {count})", [*made, "continue;"]) if count > 1 else made
        blocks += block(f"if constexpr (MANY >= {count})", taken) if count > 2 else taken
    fields = _fields(product, "some.{} + row * runs", "nullptr", "some.ones")
    rows = [f"const CodeRows x{{some.rows + row, {fields}}};", *blocks]
    near = [
        "const Range near{first, std::min(first + step, mine.last)};",
        *block("for (int64_t row = 0; row < here;)", rows),
    ]
    return [
        f"constexpr int64_t tile_bytes = (columns * {product.weight.bits} + 7) / 8 * TILE;",
        "constexpr int64_t step = std::max<int64_t>(WIDE, NEAR_BYTES / tile_bytes / WIDE * WIDE);",
        "if (mine.first == mine.last) return;",
        *block(
            "for (int64_t begin = 0, count = codes.rows(); begin < count; begin += most)",
            [
                "const int64_t here = std::min(most, count - begin);",
                *_prepare(product, "begin", "here"),
                *block("for (int64_t first = mine.first; first < mine.last; first += step)", near),
            ],
        ),
    ]


def refuses_integer_linear(spec: KernelSpec) -> str | None:
    """Weights that no function reads, groups that do not nest, sums that 32 bits may not hold."""
    reason = refuses_weight(plain(spec))
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
        "codes": ("i8",), "scale": ("fp32", "fp16"), "zero": ("i32",), "w_codes": (), "w_scale": (), "w_zero": (), "w_scale2": (),
        "bias": FLOATS, "out": FLOATS,
    },
    optional=frozenset({"zero", "w_zero", "w_scale2", "bias"}),
    sizes=("K", "N"),
    options=("group_size", "static"),
    required=("group_size",),
    buckets=tuple(BUCKETS),
    refuses=refuses_integer_linear,
)  # fmt: skip
