"""Operators that are served as they come: arithmetic over shapes that broadcast, copies, what rows sum to, attention without a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.pointwise import FUNCTIONS
from qcompile.ir import ops as _operators  # noqa: F401  registers the qcompile:: operators
from qcompile.ir.lowered import KernelSpec
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton.specs import spec

qcompile, aten = torch.ops.qcompile, torch.ops.aten
UNIT = 2.0**-24
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i64": torch.int64, "i32": torch.int32, "bool": torch.bool,
}  # fmt: skip
FLOATS = ("fp32", "bf16", "fp16")
each = pytest.mark.parametrize("instruction_set", RUNNABLE)
ONE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "neg": (torch.neg, 0), "abs": (torch.abs, 0), "reciprocal": (torch.reciprocal, 1), "exp": (torch.exp, 4), "tanh": (torch.tanh, 4),
    "erf": (torch.erf, 8), "sigmoid": (torch.sigmoid, 8), "sqrt": (torch.sqrt, 1), "rsqrt": (torch.rsqrt, 3), "sin": (torch.sin, 2),
    "cos": (torch.cos, 2), "log": (torch.log, 2), "square": (torch.square, 1),
}  # fmt: skip
"""Function of one operand -> its definition, and by how many units of the result's last place it may differ."""
TWO: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum, "minimum": torch.minimum,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
}  # fmt: skip
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
SHAPES = [((2, 3, 37), (37,)), ((2, 3, 37), (3, 1)), ((2, 1, 1), (3, 37)), ((), (2, 3, 37)), ((2, 3, 5000), (1, 5000))]
"""Shapes of two operands."""
WHOLE = [
    ("i64", "add", 2),
    ("i64", "clamp_min", 0),
    ("i64", "mul", None),
    ("i64", "gt", None),
    ("bool", "and", None),
    ("bool", "not", None),
]
SCALAR_NAMES = {"clamp_min": "min", "clamp_max": "max", "pow": "exponent", "masked_fill": "value"}
ATTENDED = [(2, 2, 20, 70, 70, True, 0, 0.0), (4, 2, 8, 5, 131, False, 0, 3.0), (2, 1, 33, 40, 40, True, 7, 0.0)]
"""Heads of queries and keys, their size, queries, keys, whether causal, window, softcap."""


def pointwise(function: str, out: str, scalar: float | None = None, **formats: str) -> KernelSpec:
    """A specification."""
    options = {} if scalar is None else {SCALAR_NAMES.get(function, "y"): scalar}
    return spec("pointwise", sizes={}, formats={**formats, "out": out}, function=function, **options)


def two(function: str, kind: str) -> KernelSpec:
    """Of two operands."""
    return pointwise(function, "bool" if function in COMPARED else kind, x=kind, y=kind)


def whole(kind: str, function: str, scalar: int | None) -> KernelSpec:
    """Of whole numbers."""
    operands = {"x": kind} | ({} if scalar is not None or function == "not" else {"y": kind})
    return pointwise(function, "bool" if function in COMPARED else kind, scalar, **operands)


def cat(kind: str, count: int, dim: int) -> KernelSpec:
    """Tensors beside each other."""
    return spec("cat", sizes={}, formats={f"tensors_{place}": kind for place in range(count)} | {"out": kind}, dim=dim)


def select(operand: str, dim: int) -> KernelSpec:
    """Places along an axis."""
    return spec("select_places", sizes={}, formats={"x": "bf16", operand: "i64", "out": "bf16"}, dim=dim)


def attention(case: tuple[Any, ...], kind: str, padded: bool) -> KernelSpec:
    """Attention without a cache."""
    heads, shared, size, _, _, causal, window, softcap = case
    formats = dict.fromkeys(("q", "k", "v", "out"), kind) | {"padding": "i64" if padded else None}
    sizes = {"H": heads, "L": shared, "D": size}
    return spec("attention", sizes=sizes, formats=formats, scale=size**-0.5, causal=causal, window=window, softcap=softcap)


GATHER = spec("gather_places", sizes={}, formats={"x": "i64", "index": "i64", "out": "i64"})
CASTS = [("fp32", "bf16"), ("i64", "fp32"), ("bool", "i64"), ("bf16", "fp32")]


def _rows(operator: str, kind: str, **options: Any) -> KernelSpec:
    formats = {"logits": kind, "out": kind, "out1": "i64"} if operator == "greatest" else {"x": kind, "out": kind}
    return spec(operator, sizes={}, formats=formats, **options)


@cache
def library(instruction_set: str) -> Kernels:
    """The kernels of this file."""
    found = [pointwise(name, kind, x=kind) for name in ONE for kind in ("fp32", "bf16")]
    found += [two(name, kind) for name in TWO for kind in ("fp32", "fp16")]
    found += [pointwise(name, "fp32", 0.75, x="fp32") for name in ("mul", "clamp_min", "clamp_max", "pow", "rsub")]
    found += [pointwise("masked_fill", "bf16", float("-inf"), x="bf16", mask="bool"), pointwise("mul", "bf16", x="bf16", y="fp32")]
    found += [pointwise("where", "fp32", condition="bool", x="fp32", y="fp32"), *(whole(*case) for case in WHOLE)]
    found += [pointwise("cast", out, x=kind) for kind, out in CASTS]
    found += [cat("bf16", 3, -1), cat("fp32", 2, -2), cat("i64", 2, -3), select("indices_2", -2), select("index", -1), GATHER]
    for kind in FLOATS:
        found += [
            _rows("softmax", kind),
            _rows("row_sum", kind, mean=False),
            _rows("row_sum", kind, mean=True),
            _rows("greatest", kind, k=3),
        ]
    found += [attention(case, kind, padded) for case in ATTENDED for kind in ("fp32", "bf16") for padded in (False, True)]
    return library_of(found, instruction_set, "-O0")


def empty(kind: str, *shape: int) -> Tensor:
    """What a kernel is to fill."""
    return torch.full(shape, torch.nan if DTYPES[kind].is_floating_point else 1, dtype=DTYPES[kind])


def assert_within(made: Tensor, exact: Tensor, bound: Tensor) -> None:
    """No element is further from the exact one than its bound, and half a unit of what is stored."""
    stored = 0.0 if made.dtype == torch.float32 else torch.finfo(made.dtype).eps / 2
    excess = (made.double() - exact).abs() - bound - stored * (exact.abs() + bound)
    assert bool((excess <= 0).all()), f"by {float(excess.max())}"


@each
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_operand(name: str, kind: str, instruction_set: str) -> None:
    x = (4 * randn(2, 3, 37)).to(DTYPES[kind])
    x = x.abs() if name in ("sqrt", "rsqrt", "log") else x
    wide, (function, units) = empty(kind, 2, 3, 40), ONE[name]
    out = wide[..., :37]
    library(instruction_set)(pointwise(name, kind, x=kind), {"x": x, "out": out}, threads=2)
    exact = function(x.double())
    assert_within(out, exact, units * 2 * UNIT * exact.abs() + (UNIT * 4 if name in ("sin", "cos", "log") else 0))
    assert bool(wide[..., 37:].isnan().all())


@each
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_operands(name: str, kind: str, shapes: tuple[tuple[int, ...], ...], instruction_set: str) -> None:
    x, y = (randn(*shape, seed=seed).to(DTYPES[kind]) for seed, shape in enumerate(shapes))
    x, y = (x.round(), y.round()) if name in COMPARED else (x, y)
    expected = TWO[name](x, y)
    out = torch.empty_like(expected)
    library(instruction_set)(two(name, kind), {"x": x, "y": y, "out": out}, threads=3)
    assert torch.equal(out, expected)  # rounded once, as in torch


@each
def test_scalars_masks_and_casts(instruction_set: str) -> None:
    run, x = library(instruction_set), randn(2, 3, 37).abs()
    cases = {"mul": x * 0.75, "clamp_min": x.clamp_min(0.75), "clamp_max": x.clamp_max(0.75), "rsub": 0.75 - x}
    for name, expected in cases.items():
        out = torch.empty_like(x)
        run(pointwise(name, "fp32", 0.75, x="fp32"), {"x": x, "out": out})
        assert torch.equal(out, expected), name
    out = torch.empty_like(x)
    run(pointwise("pow", "fp32", 0.75, x="fp32"), {"x": x, "out": out})
    assert_within(out, x.double().pow(0.75), 4 * UNIT * x.double().pow(0.75))
    mask, half, filled = x > 0.5, x.bfloat16(), empty("bf16", 2, 3, 37)
    run(pointwise("masked_fill", "bf16", float("-inf"), x="bf16", mask="bool"), {"x": half, "mask": mask[:1], "out": filled})
    assert torch.equal(filled, half.masked_fill(mask[:1], -torch.inf))
    run(pointwise("mul", "bf16", x="bf16", y="fp32"), {"x": half, "y": torch.tensor(1.5), "out": filled})
    assert torch.equal(filled, half * torch.tensor(1.5))
    run(pointwise("where", "fp32", condition="bool", x="fp32", y="fp32"), {"condition": mask, "x": x, "y": -x[:, :1], "out": out})
    assert torch.equal(out, torch.where(mask, x, -x[:, :1]))
    for kind, other in CASTS:
        given, made = (3 * randn(4, 21)).to(DTYPES[kind]), empty(other, 4, 21)
        run(pointwise("cast", other, x=kind), {"x": given, "out": made})
        assert torch.equal(made, given.to(DTYPES[other]))


@each
@pytest.mark.parametrize(("kind", "name", "scalar"), WHOLE)
def test_whole_numbers(kind: str, name: str, scalar: int | None, instruction_set: str) -> None:
    x = torch.arange(-3, 3).repeat(2, 1) * (1 << 40)
    y = torch.tensor([[-1], [2]])
    x, y = (x > 0, y > 0) if kind == "bool" else (x, y)
    made = {"add": x + 2 if scalar else None, "clamp_min": x.clamp_min(0), "mul": x * y, "gt": x > y, "and": x & y, "not": ~x}[name]
    assert made is not None
    out = torch.ones_like(made)
    library(instruction_set)(whole(kind, name, scalar), {"x": x, "y": y, "out": out})
    assert torch.equal(out, made)


@each
def test_parts_and_places(instruction_set: str) -> None:
    run = library(instruction_set)
    parts = [randn(2, 3, size, seed=size).bfloat16() for size in (4, 1, 7)]
    out = empty("bf16", 2, 3, 12)
    run(cat("bf16", 3, -1), {f"tensors_{place}": part for place, part in enumerate(parts)} | {"out": out}, threads=2)
    assert torch.equal(out, torch.cat(parts, -1))
    first, second = randn(2, 3, 5), randn(2, 5, 4, seed=1)[..., :4]
    second = torch.cat((second, randn(2, 5, 1)), -1)[:, 1:]
    beside = empty("fp32", 2, 7, 5)
    run(cat("fp32", 2, -2), {"tensors_0": first.expand(2, 3, 5), "tensors_1": second, "out": beside})
    assert torch.equal(beside, torch.cat((first, second), 1))
    numbers = torch.arange(24).view(2, 3, 4)
    above = empty("i64", 3, 3, 4)
    run(cat("i64", 2, -3), {"tensors_0": numbers, "tensors_1": numbers[:1], "out": above})
    assert torch.equal(above, torch.cat((numbers, numbers[:1])))
    x, places = randn(2, 3, 6, 8).bfloat16(), torch.tensor([5, 0, -2])
    taken = empty("bf16", 2, 3, 3, 8)
    run(select("indices_2", -2), {"x": x, "indices_2": places, "out": taken})
    assert torch.equal(taken, x[:, :, places])
    columns = empty("bf16", 2, 3, 6, 3)
    run(select("index", -1), {"x": x, "index": places, "out": columns})
    assert torch.equal(columns, x[..., places])
    table, index, gathered = torch.arange(20).view(2, 10), torch.tensor([[9, 0, 3], [1, 1, 7]]), empty("i64", 2, 3)
    run(GATHER, {"x": table, "index": index, "out": gathered})
    assert torch.equal(gathered, table.gather(1, index))


@each
@pytest.mark.parametrize("kind", FLOATS)
def test_rows(kind: str, instruction_set: str) -> None:
    x, run = (4 * randn(2, 5, 37)).to(DTYPES[kind]), library(instruction_set)
    out = empty(kind, 2, 5, 37)
    run(_rows("softmax", kind), {"x": x, "out": out})
    exact = x.double().softmax(-1)
    # The exponent of e rounds by half a unit of up to 32, and 37 numbers are summed in a lane at most.
    assert_within(out, exact, (16 + 37 + 8) * UNIT * 2 * exact + float(torch.finfo(out.dtype).smallest_normal))
    total = empty(kind, 2, 5)
    run(_rows("row_sum", kind, mean=False), {"x": x, "out": total})
    assert_within(total, x.double().sum(-1), 37 * UNIT * x.double().abs().sum(-1))
    run(_rows("row_sum", kind, mean=True), {"x": x, "out": total})
    assert_within(total, x.double().mean(-1), 38 * UNIT * x.double().abs().mean(-1))
    values, places = empty(kind, 2, 5, 3), empty("i64", 2, 5, 3)
    x[0, 0, 3], x[0, 1] = torch.nan, 1.0
    run(_rows("greatest", kind, k=3), {"logits": x, "out": values, "out1": places})
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values.nan_to_num(999), ordered[..., :3].nan_to_num(999))
    assert torch.equal(places, order[..., :3])


@each
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ATTENDED)
def test_attention_without_a_cache(case: tuple[Any, ...], kind: str, padded: bool, instruction_set: str) -> None:
    heads, shared, size, queries, keys, causal, window, softcap = case
    q = randn(2, queries, heads, size).transpose(1, 2).to(DTYPES[kind])
    k, v = (randn(2, shared, keys, size, seed=seed).to(DTYPES[kind]) for seed in (1, 2))
    padding = torch.ones(2, keys, dtype=torch.int64)
    padding[0, :3], padding[1] = 0, 0
    out, alone = empty(kind, 2, heads, queries, size), empty(kind, 2, heads, 1, size)
    given, run = {"q": q, "k": k, "v": v, "padding": padding, "out": out}, library(instruction_set)
    run(attention(case, kind, padded), given, threads=3)
    shown = padding if padded else None
    exact = qcompile.attention(q.double(), k.double(), v.double(), shown, None, size**-0.5, causal, window, softcap)
    # Scores of at most 12 round by `size` units, weights by e to that, and the values of all keys are summed.
    assert_within(out, exact, torch.full_like(exact, (12 * size / 4 + keys + 16) * UNIT * float(v.abs().max())))
    run(attention(case, kind, padded), given | {"q": q[:, :, -1:], "out": alone})
    assert torch.equal(alone, out[:, :, -1:])


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (pointwise("lgamma", "fp32", x="fp32"), "function 'lgamma': expected one of add"),
        (pointwise("div", "i64", x="i64", y="i64"), "div of whole numbers: expected floats"),
        (pointwise("and", "fp32", x="fp32", y="fp32"), "and of floats: expected whole numbers"),
        (pointwise("mul", "fp32", x="fp32", y="i64"), "y is i64 beside floats"),
        (pointwise("cast", "i64", x="fp32"), "cast of floats as i64: expected bf16 or fp16 or fp32"),
        (spec("cat", sizes={}, formats={"tensors_0": "fp32", "tensors_1": "bf16", "out": "fp32"}, dim=-1), "mixed storage"),
    ],
)
def test_what_is_refused(made: KernelSpec, reason: str) -> None:
    assert reason in str(CppBackend().refuses(made))


def test_every_function_is_tested() -> None:
    assert set(FUNCTIONS) == {*ONE, *TWO, "rsub", "pow", "clamp_min", "clamp_max", "masked_fill", "where", "and", "or", "not", "cast"}
