"""Rows of codes on their way to a product: what it is of, and what is prepared of each row before the weight passes."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from qcompile.codegen.cpp.contract import type_of
from qcompile.codegen.cpp.source import Lines, block, function, when
from qcompile.codegen.cpp.weights import Weight, plain, weight_of
from qcompile.ir.lowered import KernelSpec

MOST_ROWS = 64
"""Rows of x that pass one after the other while a part of the weight stays near."""
STACK = 1 << 17
"""Bytes that what is kept of these rows takes on a stack."""
CHUNK = 4
"""Words of a row that are taken together at most (`NearSum` in `code_dot.h`)."""


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
    def direct(self) -> bool:
        """Whether runs and rows end where blocks do: then x is read where it is, else from a copy that is 0 outside of a run."""
        return self.run % self.weight.block == 0 and self.columns % self.weight.block == 0

    @property
    def chunk(self) -> int:
        """Blocks that are taken together: every run holds a whole number of chunks."""
        blocks = gcd(self.run // self.weight.block, self.columns % self.run // self.weight.block) if self.direct else 1
        return next(count for count in range(max(1, CHUNK // self.weight.block_words), 0, -1) if blocks % count == 0)

    @property
    def even(self) -> bool:
        """Whether every run has as many blocks as any other, a number that the compiler knows."""
        return self.direct and not self.whole and self.columns % self.run == 0

    @property
    def held(self) -> int:
        """Bytes of a copied row: blocks that its runs meet, one at a border twice."""
        per = self.weight.block
        return per * sum(-(-min(first + self.run, self.columns) // per) - first // per for first in range(0, self.columns, self.run))

    @property
    def most(self) -> int:
        """Rows of x that are prepared together: blocks of four as `STACK` allows."""
        bytes_kept = self.runs * 4 * (2 + self.zero) + 8 + (0 if self.direct else self.held)
        return max(4, min(MOST_ROWS, STACK // bytes_kept // 4 * 4))

    @property
    def name(self) -> str:
        """What functions for this product begin with; those over whole rows serve any number of columns."""
        size = "" if self.whole else f"_run{self.run}"
        read = "_even" if self.even else f"_by{self.chunk}" if self.direct else "_copied"
        return f"{self.weight.name}_codes{size}{read}{'_moved' if self.zero else ''}"

    @property
    def kept(self) -> dict[str, str]:
        """What is kept by row and run, and its C++ type."""
        kinds = {"sums": "int32_t", "zeros": "int32_t", "totals": "float", "scales": "float"}
        present = {"sums": not self.weight.minimum, "zeros": self.zero, "totals": self.weight.minimum, "scales": True}
        return {name: kind for name, kind in kinds.items() if present[name]}

    @property
    def rows(self) -> str:
        """Sums beside each other: rows of x, and one of ones for the sum of the weight's codes."""
        return "ROWS + 1" if self.zero else "ROWS"


def each_run(product: Product, lines: Lines) -> Lines:
    """The lines for every run, `first` to `last`."""
    if product.whole:
        return ["const int64_t run = 0, runs = 1, first = 0, last = columns;", *lines]
    last = f"first + {product.run}"
    body = [f"const int64_t first = run * {product.run}, last = {last if product.even else f'std::min(columns, {last})'};", *lines]
    return [
        f"const int64_t runs = (columns + {product.run - 1}) / {product.run};",
        *block("for (int64_t run = 0; run < runs; run++)", body),
    ]


def prepare_function(product: Product) -> Lines:
    """Rows of x as products want them: where their codes are, what sums begin with, scales and zero points."""
    run = [
        f"x.scales[r * runs + run] = load({_own(product, 'scale', product.scale)} + {_x_group(product)}, 1)[0];",
        *_sum_of(product),
    ]
    row = ["x.rows[r] = codes.row<int8_t>(row + r);", *each_run(product, run)]
    if not product.direct:
        per = product.weight.block
        copied = [
            "// Every run has blocks of its own, and no column that is another's.",
            "std::memcpy(to + (first - begin), from + first, last - first);",
            *when(product.zero, ["std::memset(x.ones + (to - copy) + (first - begin), 1, last - first);"]),
            f"to += (last + {per - 1}) / {per} * {per} - begin;",
        ]
        run = [f"const int64_t begin = first / {per} * {per};", *copied, *run]
        row = [
            "const int8_t* from = codes.row<int8_t>(row + r);",
            "int8_t *copy = x.copies + r * x.held, *to = copy;",
            *each_run(product, run),
            "x.rows[r] = copy;",
        ]
    else:
        row[0:1] = ["const int8_t* from = codes.row<int8_t>(row + r);", "x.rows[r] = from;"]
    body = block("for (int64_t r = 0; r < count; r++)", row)
    if not product.direct:
        body = ["std::memset(x.copies, 0, count * x.held);", *when(product.zero, ["std::memset(x.ones, 0, x.held);"]), *body]
    head = f"static void {prepare_name(product)}"
    parameters = ["const Tensor& codes", "const Tensor& scale", *["const Tensor& zero"] * product.zero, "int64_t row", "int64_t count"]
    comment = "Where rows of x are, and what belongs to each run of them."
    return function(head, [*parameters, "int64_t columns", "const CodeRows& x"], comment, body)


def _x_group(product: Product) -> str:
    """The group of x that a run lies in."""
    return f"first / {product.group}" if product.group else "0"


def prepare_name(product: Product) -> str:
    """Of the function that prepares rows, by how x is scaled."""
    groups = "static" if product.static else f"g{product.group}" if product.group else "row"
    return f"{product.name}_prepare_{groups}_{product.scale}"


def _own(product: Product, operand: str, kind: str) -> str:
    """Where the scales of a row of x are."""
    return f"{operand}.at<{kind}>()" if product.static else f"{operand}.row<{kind}>(row + r)"


def few_columns(product: Product) -> bool:
    """Whether the sum of a run of x fits into 16 bits, whose products are one instruction."""
    return not product.whole and product.run * (255 if product.zero else 128) < 1 << 15


def _sum_of(product: Product) -> Lines:
    """What the codes of x in a run sum to: a float for minima; else negative, as the weight's zero points want to be multiplied."""
    lines, total = [], "sum_codes(from + first, last - first)"
    if product.zero:
        lines = [
            f"const int32_t middle = {_own(product, 'zero', 'int32_t')}[{_x_group(product)}];",
            "x.zeros[r * runs + run] = middle;",
        ]
        total = f"({total} - middle * static_cast<int32_t>(last - first))"
    if product.weight.minimum:
        return [*lines, f"x.totals[r * runs + run] = {total};"]
    taken = f"-{total}" if product.weight.zero else f"-{product.weight.middle} * {total}"
    return [*lines, f"x.sums[r * runs + run] = {taken}{' & 0xffff' if product.weight.zero and few_columns(product) else ''};"]


def product_of(spec: KernelSpec) -> Product:
    """The product of a specification that is not refused."""
    group, columns = int(spec.option("group_size")), spec.size("K")
    whole = group == -1 or group >= columns
    return Product(
        weight=weight_of(plain(spec)),
        columns=columns,
        group=0 if whole else group,
        scale=type_of(spec, "scale"),
        static=bool(spec.option("static", False)),
        zero=spec.format("zero") is not None,
    )
