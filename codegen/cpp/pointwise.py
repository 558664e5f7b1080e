"""Arithmetic of numbers by themselves over shapes that broadcast: in vectors of floats, or number by number where all are whole."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.contract import FLOATS
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import EVERY_VECTOR, vectors
from qcompile.codegen.cpp.packed_forms import helpers
from qcompile.codegen.cpp.source import Lines, block, constants, number
from qcompile.ir.lowered import Kernel, KernelSpec

PIECE = 4096
"""Columns that a thread takes at once."""
WHOLE = ("i64", "i32", "bool")
SCALARS = ("y", "min", "max", "exponent", "value")
"""Options that are numbers in place of an operand."""


@dataclass(frozen=True)
class Function:
    """A result, by the names of operands: of vectors of floats, and of whole numbers ("" if there is none)."""

    floats: str
    whole: str = ""


def _compared(sign: str) -> Function:
    return Function(f"truth(x {sign} y)", f"x {sign} y")


FUNCTIONS: dict[str, Function] = {
    "add": Function("x + y", "x + y"),
    "sub": Function("x - y", "x - y"),
    "rsub": Function("y - x", "y - x"),
    "mul": Function("x * y", "x * y"),
    "div": Function("x / y"),
    "neg": Function("-x", "-x"),
    "abs": Function("magnitude(x)", "x < 0 ? -x : x"),
    "reciprocal": Function("splat(1.0f) / x"),
    "exp": Function("exp(x)"),
    "tanh": Function("tanh(x)"),
    "erf": Function("erf(x)"),
    "sigmoid": Function("splat(1.0f) / (splat(1.0f) + exp(-x))"),
    "sqrt": Function("each(x, [](float value) { return std::sqrt(value); })"),
    "rsqrt": Function("splat(1.0f) / each(x, [](float value) { return std::sqrt(value); })"),
    "sin": Function("each(x, [](float value) { return std::sin(value); })"),
    "cos": Function("each(x, [](float value) { return std::cos(value); })"),
    "log": Function("each(x, [](float value) { return std::log(value); })"),
    "pow": Function("each(x, [&](float value) { return std::pow(value, exponent[0]); })"),
    "square": Function("x * x", "x * x"),
    # What is no number stays none.
    "clamp_min": Function("choose(x < min, min, x)", "x < min ? min : x"),
    "clamp_max": Function("choose(x > max, max, x)", "x > max ? max : x"),
    "maximum": Function("choose((x > y) | (x != x), x, y)", "x > y ? x : y"),
    "minimum": Function("choose((x < y) | (x != x), x, y)", "x < y ? x : y"),
    "eq": _compared("=="),
    "ne": _compared("!="),
    "lt": _compared("<"),
    "le": _compared("<="),
    "gt": _compared(">"),
    "ge": _compared(">="),
    "and": Function("", "x & y"),
    "or": Function("", "x | y"),
    "not": Function("truth(x == Floats{})", "!x"),
    "where": Function("choose(condition != Floats{}, x, y)", "condition ? x : y"),
    "masked_fill": Function("choose(mask != Floats{}, value, x)", "mask ? value : x"),
    "cast": Function("x", "x"),
}
"""Function -> what it gives."""


def _inputs(spec: KernelSpec) -> list[str]:
    return [name for name in POINTWISE.present(spec) if name != "out"]


def _is_whole(spec: KernelSpec) -> bool:
    """Whether every number is a whole one."""
    scalars = [spec.option(name) for name in SCALARS if spec.option(name) is not None]
    return all(spec.format(name) in WHOLE for name in (*_inputs(spec), "out")) and all(isinstance(value, int) for value in scalars)


def emit_pointwise(spec: KernelSpec) -> Kernel:
    """`out` = a function of operands whose axes are those of the result, or 1, or missing at the front."""
    names, kind = _inputs(spec), type_of(spec, "out")
    pointers = [line for name in names for line in _operand(name, type_of(spec, name))]
    begin = [
        "const int64_t row = item / pieces, first = item % pieces * piece, last = std::min(columns, first + piece);",
        *pointers,
        f"{kind}* to = out.row<{kind}>(row);",
    ]
    body = [
        *constants({"piece": (PIECE, "columns at once")}),
        "const int64_t columns = out.rank ? out.size[out.rank - 1] : 1, pieces = (columns + piece - 1) / piece;",
        "const Range mine = team.share(out.rows() * pieces);",
        *block(
            "for (int64_t item = mine.first; item < mine.last; item++)", [*begin, *(_whole(spec) if _is_whole(spec) else _floats(spec))]
        ),
    ]
    return kernel(spec, POINTWISE.present(spec), body, [EVERY_VECTOR, *helpers("pointwise")])


def _operand(name: str, kind: str) -> Lines:
    return [f"const {kind}* {name}_row = row_for<{kind}>({name}, out, row);", f"const int64_t {name}_step = step_of({name});"]


def _scalars(spec: KernelSpec) -> dict[str, float]:
    return {name: spec.option(name) for name in SCALARS if spec.option(name) is not None}


def _floats(spec: KernelSpec) -> Lines:
    names = _inputs(spec)
    values = [f"const auto {name} = lanes_of({name}_row, {name}_step, column, count);" for name in names]
    # An operand's name is hidden by its numbers.
    values += [f"const Floats {name} = splat({number(value)});" for name, value in _scalars(spec).items()]
    return vectors([*values, f"put_lanes(to + column, {FUNCTIONS[spec.option('function')].floats}, count);"], "first", "last")


def _whole(spec: KernelSpec) -> Lines:
    values = [f"const int64_t {name} = {name}_row[column * {name}_step];" for name in _inputs(spec)]
    values += [f"const int64_t {name} = {int(value)};" for name, value in _scalars(spec).items()]
    result = FUNCTIONS[spec.option("function")].whole
    return block("for (int64_t column = first; column < last; column++)", [*values, f"to[column] = {result};"])


def refuses_pointwise(spec: KernelSpec) -> str | None:
    """Functions that are not known, or not of whole numbers; results that are whole where floats went in."""
    name = spec.option("function")
    if name not in FUNCTIONS:
        return f"function {name!r}: expected one of {', '.join(FUNCTIONS)}"
    if _is_whole(spec):
        return None if FUNCTIONS[name].whole else f"{name} of whole numbers: expected floats"
    if not FUNCTIONS[name].floats:
        return f"{name} of floats: expected whole numbers"
    wide = [operand for operand in _inputs(spec) if spec.format(operand) in ("i64", "i32") and name != "cast"]
    if wide:
        return f"{wide[0]} is {spec.format(wide[0])} beside floats: expected floats, which hold every number that is stored"
    compared = name in ("eq", "ne", "lt", "le", "gt", "ge", "not")
    if compared != (spec.format("out") == "bool") or spec.format("out") in ("i64", "i32"):
        return f"{name} of floats as {spec.format('out')}: expected {'bool' if compared else ' or '.join(FLOATS)}"
    return None


_ANY = (*FLOATS, *WHOLE)
POINTWISE = Operator(
    emit=emit_pointwise,
    operands={"condition": ("bool",), "x": _ANY, "y": _ANY, "mask": ("bool",), "min": _ANY, "max": _ANY, "out": _ANY},
    optional=frozenset({"condition", "y", "mask", "min", "max"}),
    sizes=(),
    options=("function", *SCALARS),
    required=("function",),
    refuses=refuses_pointwise,
)
