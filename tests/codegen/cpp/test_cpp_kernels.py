"""Every kernel but the linear ones against its operator in float64, for every instruction set that runs here."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from qcompile.ir import ops as _operators  # noqa: F401  registers the qcompile:: operators
from qcompile.ir.lowered import KernelSpec
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton.specs import spec

qcompile = torch.ops.qcompile
UNIT = 2.0**-24
FLOAT = "fp32"
ROWS = (2, 3)
NORMS = [(columns, offset, weighted) for columns, offset, weighted in ((64, 0.0, True), (37, 1.0, True), (5, 0.0, False))]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
CACHES = [("fp32", 16, 0, 0.0, False), ("fp16", 20, 0, 0.0, True), ("bf16", 5, 7, 3.0, False)]
"""Storage, head size, window, softcap, sinks."""


def _norm(columns: int, offset: float, weighted: bool, summed: bool) -> KernelSpec:
    formats = {"x": FLOAT, "weight": FLOAT if weighted else None, "out": FLOAT} | ({"residual": FLOAT, "out1": FLOAT} if summed else {})
    return spec("add_rms_norm" if summed else "rms_norm", sizes={"K": columns}, formats=formats, eps=1e-5, offset=offset)


def _gated(name: str, columns: int) -> KernelSpec:
    return spec("gated_activation", sizes={"I": columns}, formats={"gate": FLOAT, "up": FLOAT, "out": FLOAT}, activation=name)


def _activation(name: str) -> KernelSpec:
    return spec("activation", sizes={"K": 21}, formats={"x": FLOAT, "out": FLOAT}, activation=name)


def _append(kind: str, size: int) -> KernelSpec:
    formats = {"keys": kind, "values": kind, "k": FLOAT, "v": FLOAT, "page_table": "i32", "positions": "i64"}
    return spec("cache_append_", sizes={"L": 2, "D": size}, formats=formats)


def _attend(kind: str, size: int, window: int, softcap: float, sinks: bool, bucket: str = "m1") -> KernelSpec:
    formats = {"q": FLOAT, "keys": kind, "values": kind, "page_table": "i32", "positions": "i64", "out": FLOAT}
    sizes = {"H": 4, "L": 2, "D": size}
    formats |= {"sinks": FLOAT} if sinks else {}
    return spec("cache_attend", bucket, sizes=sizes, formats=formats, scale=size**-0.5, window=window, softcap=softcap)


ADD = spec("add", sizes={"K": 19}, formats={"x": FLOAT, "y": FLOAT, "out": FLOAT})
TABLE = spec("rotary_table", sizes={"F": 10}, formats={"positions": "i64", "inv_freq": FLOAT, "out": FLOAT, "out1": FLOAT}, scaling=1.25)
ROPE = spec("rope", sizes={"H": 3, "R": 20}, formats={"x": FLOAT, "cos": FLOAT, "sin": FLOAT, "out": FLOAT})
EMBEDDING = spec("embedding", sizes={"N": 35, "K": 21}, formats={"weight": FLOAT, "indices": "i64", "out": FLOAT})
GATHER = spec("gather_last", sizes={"K": 9}, formats={"x": FLOAT, "positions": "i64", "out": FLOAT})
SPECS = [
    *(_norm(*case, summed) for case in NORMS for summed in (False, True)), *(_gated(name, 37) for name in ACTIVATIONS),
    *map(_activation, ACTIVATIONS), *(_append(*case[:2]) for case in CACHES), *(_attend(*case) for case in CACHES),
    ADD, TABLE, ROPE, EMBEDDING, GATHER,
]  # fmt: skip


@cache
def library(instruction_set: str) -> Kernels:
    """The kernels of this file."""
    return library_of(SPECS, instruction_set)


each_set = pytest.mark.parametrize("instruction_set", RUNNABLE)


def empty(*shape: int) -> Tensor:
    """What a kernel is to fill."""
    return torch.full(shape, torch.nan)


@each_set
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(("columns", "offset", "weighted"), NORMS)
def test_norms(columns: int, offset: float, weighted: bool, summed: bool, instruction_set: str) -> None:
    x, residual, weight = randn(*ROWS, columns), randn(*ROWS, columns, seed=1), randn(columns, seed=2) if weighted else None
    out, out1 = empty(*ROWS, columns), empty(*ROWS, columns)
    given = {"x": x, "residual": residual, "out": out, "out1": out1} | ({} if weight is None else {"weight": weight})
    library(instruction_set)(_norm(columns, offset, weighted, summed), given)
    total = x + residual if summed else x
    exact = qcompile.rms_norm(total.double(), None if weight is None else weight.double(), 1e-5, offset)
    assert not summed or torch.equal(out, total)
    # A quarter of the squares is summed in a lane where lanes are fewest; root, quotient and the gain round a few times.
    assert_within(out1 if summed else out, exact, (columns / 4 + 12) * UNIT * exact.abs())


@each_set
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, instruction_set: str) -> None:
    from qcompile.ir.ops import ACTIVATIONS as DEFINED

    x, out = 8 * randn(*ROWS, 21), empty(*ROWS, 21)
    x[0, 0, :4] = torch.tensor([0.0, -200.0, 200.0, -0.0])
    library(instruction_set)(_activation(name), {"x": x, "out": out})
    # 1 + erf and 1 + tanh lose what cancels: an error of the unit, times x.
    assert_within(out, DEFINED[name](x.double()), 8 * UNIT * x.abs())
    gate, up, gated = 8 * randn(*ROWS, 37, seed=1), randn(*ROWS, 37, seed=2), empty(*ROWS, 37)
    library(instruction_set)(_gated(name, 37), {"gate": gate, "up": up, "out": gated})
    assert_within(gated, DEFINED[name](gate.double()) * up, 8 * UNIT * (gate * up).abs())


@each_set
def test_sums_and_rows(instruction_set: str) -> None:
    x, y, out = randn(2, 3, 19), randn(2, 3, 19, seed=1), empty(2, 3, 19)
    library(instruction_set)(ADD, {"x": x, "y": y, "out": out})
    assert torch.equal(out, x + y)
    table, indices, rows = randn(35, 21), torch.tensor([[0, 34, 16], [15, 3, 3]]), empty(2, 3, 21)
    library(instruction_set)(EMBEDDING, {"weight": table, "indices": indices, "out": rows})
    assert torch.equal(rows, table[indices])
    tokens, positions, last = randn(3, 4, 9), torch.tensor([[-1, 0, 1, 2], [5, 6, -1, -1], [0, 1, 2, 3]]), empty(3, 1, 9)
    library(instruction_set)(GATHER, {"x": tokens, "positions": positions, "out": last})
    assert torch.equal(last, qcompile.gather_last(tokens, positions))


@each_set
def test_rotary_positions(instruction_set: str) -> None:
    positions, frequencies = torch.tensor([[0, 1, 500], [7, -1, 3]]), 10000.0 ** -(torch.arange(10) / 10.0)
    cos, sin = empty(2, 3, 20), empty(2, 3, 20)
    library(instruction_set)(TABLE, {"positions": positions, "inv_freq": frequencies, "out": cos, "out1": sin})
    expected = qcompile.rotary_table(positions, frequencies, 1.25, torch.float32)
    for made, exact in zip((cos, sin), expected, strict=True):
        assert_within(made, exact.double(), torch.full_like(exact, 4 * UNIT))
    x, out = randn(2, 3, 3, 20).transpose(1, 2), empty(2, 3, 3, 20)
    for batch in (2, 1):
        library(instruction_set)(ROPE, {"x": x, "cos": cos[:batch], "sin": sin[:batch], "out": out})
        exact = qcompile.rope(x.double(), cos[:batch].double(), sin[:batch].double())
        assert_within(out, exact, torch.full_like(exact, 4 * UNIT * 1.25 * float(x.abs().max())))


def _cache(kind: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of 12 pages of 16 tokens, and which of them three sequences have."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    keys, values = (randn(12, 2, 16, size, seed=seed).to(dtype) for seed in (5, 6))
    return keys, values, torch.tensor([[3, 7, 1, 0, 9, 11], [2, 5, 4, 6, 8, 10], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)


@each_set
@pytest.mark.parametrize(("kind", "size", "window", "softcap", "sinks"), CACHES)
def test_the_cache(kind: str, size: int, window: int, softcap: float, sinks: bool, instruction_set: str) -> None:
    keys, values, pages = _cache(kind, size)
    k, v = (randn(3, 4, 2, size, seed=seed).transpose(1, 2) for seed in (7, 8))
    positions = torch.tensor([[70, 71, 72, 73], [-1, -1, 3, 4], [-1, -1, -1, -1]])
    expected = keys.clone(), values.clone()
    qcompile.cache_append_(*expected, k, v, pages, positions)
    given = {"keys": keys, "values": values, "k": k, "v": v, "page_table": pages, "positions": positions}
    library(instruction_set)(_append(kind, size), given)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    q, out = randn(3, 4, 4, size, seed=9).transpose(1, 2), empty(3, 4, 4, size).transpose(1, 2)
    extra = randn(4, seed=10) if sinks else None
    attending = {"q": q, "keys": keys, "values": values, "page_table": pages, "positions": positions, "out": out}
    attending |= {} if extra is None else {"sinks": extra}
    library(instruction_set)(_attend(kind, size, window, softcap, sinks), attending)
    shared = torch.full_like(out, torch.nan)
    library(instruction_set)(_attend(kind, size, window, softcap, sinks), attending | {"out": shared}, threads=5)
    assert torch.equal(out, shared)
    exact = qcompile.cache_attend(
        q.double(), keys, values, pages, positions, size**-0.5, window, softcap, None if extra is None else extra.double()
    )
    # Scores of at most 12 round by size / 4 units, weights by e to that, and 74 of them are summed.
    assert_within(out, exact, torch.full_like(exact, (12 * size / 4 + 90) * UNIT * float(values.abs().max())))


def assert_within(made: Tensor, exact: Tensor, bound: Tensor) -> None:
    """No element is further from the exact one than its bound."""
    excess = (made.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"by {float(excess.max())}"
