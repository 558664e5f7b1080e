"""Packed caches in C++ against their definitions, for every instruction set that runs here: bytes exactly, attention within rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qcompile.codegen.cpp.backend import CppBackend
from qcompile.ir import append_ops as _append_ops  # noqa: F401  registers what packs and stores at once
from qcompile.ir import retention_ops as _retention_ops  # noqa: F401  registers caches that keep some tokens as they came
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.retention import Retention
from qcompile.quant.vector_format import vector_format
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton.specs import spec

qcompile = torch.ops.qcompile
UNIT = 2.0**-24
HEADS, FLOAT, BYTES = 2, "fp32", "uint8"
PLACES = {"page_table": "i32", "positions": "i64"}
FORMS = [
    ("int8 g64 sym", 64), ("int4 g64 sym", 64), ("int4 g32 asym", 96), ("int2 g16 sym", 32), ("int4 asym", 5), ("int8 asym", 20),
    ("int2 asym", 7), ("int4 g8 sym", 40), ("fp8 g64 sym", 64), ("fp8 g20 sym", 20), ("int8 static", 20), ("int4 static", 7),
]  # fmt: skip


class Case(NamedTuple):
    """One attention; queries of a head of keys are `group`."""

    keys: str
    values: str
    size: int
    group: int = 2
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    policy: Retention = Retention()
    fast: bool = False

    @property
    def specs(self) -> dict[str, KernelSpec]:
        """Every kernel that a layer of it calls, by operator and, where there are two, form."""
        forms = {"k_form": self.keys, "v_form": self.values}
        heads, sizes = {"H": HEADS * self.group, "L": HEADS, "D": self.size}, {"L": HEADS, "D": self.size}
        formats = {"q": FLOAT, "keys": BYTES, "values": BYTES, "out": FLOAT, "sinks": FLOAT if self.sinks else None, **PLACES}
        options: dict[str, Any] = {"scale": self.size**-0.5, "window": self.window, "softcap": self.softcap, **forms}
        options |= {"products": "fast"} if self.fast else {}
        if not self.policy.rows:
            stored = {"keys": BYTES, "values": BYTES, "k": FLOAT, "v": FLOAT, **PLACES}
            tables = dict.fromkeys(self.tables, "fp16")
            return {
                "attend": spec("cache_attend_packed", "m1", sizes=heads, formats=formats | tables, **options),
                "append": spec("append_packed_", sizes=sizes, formats=stored | tables, **forms),
            }
        exact = {"exact_keys": "fp16", "exact_values": "fp16"}
        pages, rows = {"pages": BYTES, "exact": "fp16", **PLACES}, {"rows": "fp16", "slots": "i32"}
        policy = vars(self.policy)
        return {
            "attend": spec("attend_settled", "m1", sizes=heads, formats=formats | exact, **options, **policy),
            "recent": spec("with_recent", sizes={**sizes, "N": self.policy.rows}, formats={**rows, "x": FLOAT, "out": "fp16"}),
            "retain": spec("retain_", sizes=sizes, formats={**rows, "exact": "fp16", "positions": "i64"}, **policy),
            "settle keys": spec("settle_", sizes=sizes, formats=pages, form=self.keys, **policy),
            "settle values": spec("settle_", sizes=sizes, formats=pages, form=self.values, **policy),
        }

    @property
    def tables(self) -> dict[str, Tensor]:
        """Scales of forms that have a table, by operand: some of what is stored is clipped."""
        forms = {"k_tables_0": self.keys, "v_tables_0": self.values}
        return {name: _table(form, self.size) for name, form in forms.items() if vector_format(form).tables}


def _table(form: str, size: int) -> Tensor:
    """The scales of a static form, from numbers that are smaller than those of the tests."""
    return vector_format(form).calibrate(0.7 * randn(30, HEADS, size, seed=9), torch.ones(HEADS, size))[0]


STORED = [
    Case("int8 g64 sym", "int8 g64 sym", 64, 3),
    Case("int4 g64 sym", "int4 g32 asym", 96, 1, softcap=3.0),
    Case("int2 g16 asym", "int4 g8 sym", 40, 4, window=70, sinks=True),
    Case("int4 asym", "int2 asym", 7, 5, window=9),
    Case("fp8 g32 sym", "fp8 g64 sym", 96, 2),
    Case("int8 static", "int4 static", 20, 2),
    Case("int8 g32 sym", "int4 g64 asym", 64, 3, fast=True),
]
SETTLED = [
    Case("int4 g64 sym", "int4 g64 sym", 20, 3, policy=Retention(4, 9, 1)),
    Case("int4 t32 asym", "int4 g32 asym", 64, 2, policy=Retention(4, 16, 32)),
    Case("int2 t32 asym", "int2 g32 asym", 64, 1, window=50, sinks=True, policy=Retention(0, 5, 32)),
    Case("int8 t16 sym", "int4 asym", 5, 2, softcap=2.0, policy=Retention(3, 0, 32)),
]


def _pack(form: str, size: int) -> KernelSpec:
    tables = dict.fromkeys(("tables_0",) if vector_format(form).tables else (), "fp16")
    return spec("pack_vectors", sizes={"D": size}, formats={"x": FLOAT, "out": BYTES, **tables}, form=form)


def _append_bytes(width: int) -> KernelSpec:
    given = dict.fromkeys(("keys", "values", "k", "v"), BYTES)
    return spec("cache_append_", sizes={"L": HEADS, "D": width}, formats={**given, **PLACES})


LONG = [
    Case("", "", 64, 3),
    Case("int4 g32 sym", "int8 g64 asym", 96, 1, window=400),
    Case("int4 t64 asym", "int4 g64 sym", 64, 3, policy=Retention(4, 28, 64)),
    Case("int4 t64 asym", "int4 g64 sym", 64, 3, policy=Retention(4, 28, 64), fast=True),
]
"""Over sequences of several parts; the first holds numbers of 16 bits."""


def _long(case: Case) -> KernelSpec:
    """The attention of a long case."""
    attend = case.specs["attend"] if case.keys else None
    if attend is not None:
        return attend
    formats = {"q": FLOAT, "keys": "fp16", "values": "fp16", "out": FLOAT, **PLACES}
    sizes = {"H": HEADS * case.group, "L": HEADS, "D": case.size}
    return spec("cache_attend", "m1", sizes=sizes, formats=formats, scale=case.size**-0.5, window=0, softcap=0.0)


@cache
def library(instruction_set: str) -> Kernels:
    """The kernels of this file."""
    wanted = [
        *map(_long, LONG),
        *(_pack(*form) for form in FORMS),
        _append_bytes(7),
        *(made for case in STORED + SETTLED for made in case.specs.values()),
    ]
    return library_of(wanted, instruction_set)


each_set = pytest.mark.parametrize("instruction_set", RUNNABLE)


@pytest.mark.parametrize("case", [STORED[0], SETTLED[1]], ids=lambda case: case.keys)
def test_other_products_than_fast_are_refused(case: Case) -> None:
    attend = case.specs["attend"]
    unknown = replace(attend, options=(*attend.options, ("products", "faster")))
    assert CppBackend().refuses(unknown) == "products='faster': expected 'fast', or no such option"


@each_set
@pytest.mark.parametrize(("form", "size"), FORMS)
def test_packing_is_the_definition(form: str, size: int, instruction_set: str) -> None:
    x = randn(3, 4, HEADS, size).transpose(1, 2)
    x[0, 0] = 0.0  # nothing to scale
    x[1, 0, 0] = torch.arange(size) / 2.0 - size // 4  # ties, where the scale is a power of two
    x[2] *= 1e-7  # scales below the normal numbers of 16 bits
    x[2, 1, 0] = torch.linspace(-1, 1, size).pow(5)  # many sizes beside each other
    tables = {"tables_0": _table(form, size)} if vector_format(form).tables else {}
    expected = qcompile.pack_vectors(x, form, list(tables.values()))
    out = torch.full_like(expected, 77)
    library(instruction_set)(_pack(form, size), {"x": x, "out": out, **tables})
    assert torch.equal(out, expected)


@each_set
def test_packed_vectors_are_stored(instruction_set: str) -> None:
    k, v = (torch.randint(0, 256, (3, HEADS, 4, width), dtype=torch.uint8) for width in (7, 9))
    pages, positions = torch.tensor([[3, 1], [2, 0], [0, 0]], dtype=torch.int32), torch.tensor([[14, 15, 16, 17], [-1, 3, 4, -1], [-1] * 4])
    made, expected = ([torch.zeros(4, HEADS, 16, width, dtype=torch.uint8) for width in (7, 9)] for _ in range(2))
    qcompile.cache_append_(*expected, k, v, pages, positions)
    given = {"keys": made[0], "values": made[1], "k": k, "v": v, "page_table": pages, "positions": positions}
    library(instruction_set)(_append_bytes(7), given)
    assert all(map(torch.equal, made, expected))


CALLS = (
    [[*range(83)], [-1] * 43 + [*range(40)], [*range(7)] + [-1] * 76],
    [[83, 84, 85], [-1, 40, -1], [7, -1, 8]],
    [[86], [-1], [9]],
)
"""Positions of three sequences in three calls: a prompt with padding before or behind, some tokens with padding inside, a single one."""
TABLE = torch.tensor([[3, 7, 1], [2, 5, 4], [0, 6, 8]], dtype=torch.int32)
SLOTS = torch.tensor([2, 0, 3], dtype=torch.int32)


@each_set
@pytest.mark.parametrize("case", STORED, ids=str)
def test_attention_over_packed_pages(case: Case, instruction_set: str) -> None:
    kernels, specs = library(instruction_set), case.specs
    keys, values = (torch.zeros(9, HEADS, 32, vector_format(form).width(case.size), dtype=torch.uint8) for form in case[:2])
    for call in CALLS:
        positions, (q, k, v, sinks) = torch.tensor(call), _inputs(case, len(call[0]))
        expected = keys.clone(), values.clone()
        lists = {name.removesuffix("_0"): [table] for name, table in case.tables.items()}
        qcompile.append_packed_(*expected, k, v, TABLE, positions, *case[:2], **lists)
        places = {"keys": keys, "values": values, "page_table": TABLE, "positions": positions, **case.tables}
        kernels(specs["append"], {**places, "k": k, "v": v}, threads=2)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])
        options = (case.size**-0.5, case.window, case.softcap, None if sinks is None else sinks.double())
        exact = qcompile.cache_attend_packed(q.double(), keys, values, TABLE, positions, *case[:2], *options, **lists)
        _require_attention(kernels, case, {**places, "q": q} | ({} if sinks is None else {"sinks": sinks}), exact)


@each_set
@pytest.mark.parametrize("case", SETTLED, ids=str)
def test_attention_over_what_settles(case: Case, instruction_set: str) -> None:
    kernels, specs, policy = library(instruction_set), case.specs, list(vars(case.policy).values())
    pages = [torch.zeros(9, HEADS, 32, vector_format(form).width(case.size), dtype=torch.uint8) for form in case[:2]]
    rows = [torch.zeros(4, HEADS, case.policy.rows, case.size, dtype=torch.float16) for _ in pages]
    for call in CALLS:
        positions, (q, *given, sinks) = torch.tensor(call), _inputs(case, len(call[0]))
        exact = []
        for name, page, kept, x, form in zip(("keys", "values"), pages, rows, given, case[:2], strict=True):
            came = torch.full((3, HEADS, case.policy.rows + len(call[0]), case.size), torch.nan, dtype=torch.float16)
            kernels(specs["recent"], {"rows": kept, "x": x, "slots": SLOTS, "out": came})
            assert torch.equal(came, qcompile.with_recent(kept, x, SLOTS))
            packed = qcompile.settle(page, came, TABLE, positions, form, *policy)
            kernels(specs[f"settle {name}"], {"pages": page, "exact": came, "page_table": TABLE, "positions": positions}, threads=2)
            assert torch.equal(page, packed)
            retained = qcompile.retain(kept, came, SLOTS, positions, *policy)
            kernels(specs["retain"], {"rows": kept, "exact": came, "slots": SLOTS, "positions": positions}, threads=3)
            assert torch.equal(kept, retained)
            exact.append(came)
        options = (case.size**-0.5, case.window, case.softcap, None if sinks is None else sinks.double())
        double = qcompile.attend_settled(q.double(), *pages, *exact, TABLE, positions, *case[:2], *policy, *options)
        places = {"page_table": TABLE, "positions": positions, "q": q} | ({} if sinks is None else {"sinks": sinks})
        places |= dict(zip(("keys", "values", "exact_keys", "exact_values"), (*pages, *exact), strict=True))
        _require_attention(kernels, case, places, double)


def _inputs(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q = randn(3, tokens, HEADS * case.group, case.size, seed=1).transpose(1, 2)
    k, v = (randn(3, tokens, HEADS, case.size, seed=seed).transpose(1, 2) for seed in (2, 3))
    return q, k, v, randn(HEADS * case.group, seed=4) if case.sinks else None


def _bound(case: Case, q: Tensor, k: Tensor, v: Tensor) -> float:
    """What rounding adds up to at most in results over keys and values [B, T, L, D], or nearly: a quarter of the errors of a long sum.

    A score is at most |q| |k| scale; codes without a sign are twice as great as numbers with one. A weight errs by the errors of two
    scores, and the weights of values are added up, twice as great again.
    """
    score = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * case.size**-0.5
    bound = (2 * 2 * (case.size / 4 + 8) * score + 2 * (k.shape[1] / 4 + 16)) * UNIT * float(v.abs().max())
    return bound + _halves(case, q, k, v) if case.fast else bound


def _halves(case: Case, q: Tensor, k: Tensor, v: Tensor) -> float:
    """What half units of 16 bits add up to: as often up as down, so that the sum of many grows like a root, here of a stretch of tokens.

    Each is at most 2^-14.9 of the largest number beside it, and meets codes up to twice as great as the largest number with a sign.
    """
    score = case.size**0.5 * float(q.abs().max() * 2 * k.abs().max()) * case.size**-0.5
    return (2 * score + 256**0.5 * 2) * 2.0**-14.9 * float(v.abs().max())


def _require_attention(kernels: Kernels, case: Case, operands: dict[str, Tensor], exact: Tensor) -> None:
    """Within rounding of the exact result, and the same bits whatever threads share it or rows are beside it."""
    out = [torch.full_like(operands["q"], torch.nan) for _ in range(4)]
    for result, threads in zip(out, (1, 2, 7), strict=False):
        kernels(case.specs["attend"], {**operands, "out": result}, threads)
    per_row = ("q", "page_table", "positions", "exact_keys", "exact_values")
    for row in range(3):
        alone = {name: value[row : row + 1] if name in per_row else value for name, value in operands.items()}
        kernels(case.specs["attend"], {**alone, "out": out[3][row : row + 1]})
    bound = _bound(case, operands["q"], *(randn(3, 83, HEADS, case.size, seed=seed) for seed in (2, 3)))
    assert float((out[0] - exact).abs().max()) < bound
    for other in out[1:]:
        assert torch.equal(out[0], other)


LENGTHS = (701, 300, 5)
"""Of three sequences: several parts, a page border and odd numbers of tokens."""


def _stored(case: Case, numbers: list[Tensor], new: int) -> dict[str, Tensor]:
    """Pages and rows of long sequences, in pages of 64 tokens in an order of their own, before `new` tokens each."""
    policy, count = case.policy, -(-max(LENGTHS) // 64)
    table = torch.randperm(3 * count, generator=torch.Generator().manual_seed(7)).to(torch.int32).view(3, count)
    found: dict[str, Tensor] = {"page_table": table}
    for name, form, part in zip(("keys", "values"), (case.keys, case.values), numbers, strict=True):
        slots = torch.nn.functional.pad(part[:, :, policy.first :], (0, 0, 0, 64 * count - part.shape[2] + policy.first))
        cells = vector_format(form).encode(slots) if form else slots.half()
        pages = torch.empty(3 * count, HEADS, 64, cells.shape[-1], dtype=cells.dtype)
        pages[table.long()] = cells.unflatten(2, (count, 64)).transpose(1, 2)
        found[name] = pages
        if policy.rows:
            exact = torch.zeros(3, HEADS, policy.rows + new, case.size, dtype=torch.float16)
            for row, length in enumerate(LENGTHS):
                for position in (place for place in policy.held(length - new) if place < length - new):
                    exact[row, :, policy.row(position)] = part[row, :, position]
                exact[row, :, policy.rows :] = part[row, :, length - new : length]
            found[f"exact_{name}"] = exact
    return found


@each_set
@pytest.mark.parametrize("case", LONG, ids=str)
def test_threads_share_long_sequences(case: Case, instruction_set: str) -> None:
    """Decoding and 60 or 5 queries at once give the same bits for any number of threads, near the exact result."""
    kernels, attend, bits = library(instruction_set), _long(case), []
    numbers = [randn(3, HEADS, max(LENGTHS), case.size, seed=seed).half().float() for seed in (2, 3)]
    queries = randn(3, HEADS * case.group, 60, case.size, seed=5)
    for new in (1, 5, 60):
        if case.policy.rows and new > min(LENGTHS):
            continue  # what has settled before the shortest would be negative
        positions = torch.stack([torch.arange(length - new, length).clamp(min=-1) for length in LENGTHS])
        operands = {**_stored(case, numbers, new), "positions": positions, "q": queries[:, :, 60 - new :]}
        results = []
        for threads in (1, 2, 5):
            results.append(torch.full_like(operands["q"].contiguous(), torch.nan))
            kernels(attend, {**operands, "out": results[-1]}, threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        bits.append(results[0][:, :, -1])
        exact = _exactly(case, operands)
        assert float((results[0] - exact).abs().max()) < _bound(case, queries, *(part.transpose(1, 2) for part in numbers))
    assert all(torch.equal(bits[0], other) for other in bits[1:])


def _exactly(case: Case, operands: dict[str, Tensor]) -> Tensor:
    """The definition in float64."""
    exact = ("exact_keys", "exact_values") if case.policy.rows else ()
    stored = [operands[name] for name in ("keys", "values", *exact, "page_table", "positions")]
    operator = qcompile.attend_settled if case.policy.rows else qcompile.cache_attend_packed if case.keys else qcompile.cache_attend
    forms = case[:2] if case.keys else ()
    policy = vars(case.policy).values() if case.policy.rows else ()
    return operator(operands["q"].double(), *stored, *forms, *policy, case.size**-0.5, case.window)


def test_what_is_refused_says_why() -> None:
    case = Case("int4 t32 asym", "int4 g32 asym", 64, policy=Retention(4, 16, 32))
    backend, attend = CppBackend(), case.specs["attend"]
    assert backend.refuses(attend) is None
    assert "expected int2, int4, int8 or fp8" in str(backend.refuses(case._replace(keys="bfp4 g16").specs["attend"]))
    static = case._replace(keys="int8 static").specs["attend"]
    assert "k_form is int8 static: expected scales among the codes" in str(backend.refuses(static))
    assert "v_form is int4 t32 asym: expected scales of each token" in str(
        backend.refuses(case._replace(values="int4 t32 asym").specs["attend"])
    )
    assert "group=48: expected a multiple of the 32 tokens" in str(
        backend.refuses(case._replace(policy=Retention(4, 16, 48)).specs["settle keys"])
    )
    assert "groups of whole bytes" in str(backend.refuses(_pack("int2 g2 sym", 64)))
    assert "k is fp32: expected uint8" in str(
        backend.refuses(
            spec(
                "cache_append_",
                sizes={"L": 1, "D": 8},
                formats={**dict.fromkeys(("keys", "values"), BYTES), "k": FLOAT, "v": FLOAT, **PLACES},
            )
        )
    )


@each_set
def test_fast_products_round_where_integers_are_summed(instruction_set: str) -> None:
    """Elsewhere codes meet floats, and the bits are the same."""
    kernels = library(instruction_set)
    exact, fast = (case for case in LONG if case.keys == "int4 t64 asym")
    numbers = [randn(3, HEADS, max(LENGTHS), exact.size, seed=seed).half().float() for seed in (2, 3)]
    positions = torch.tensor([[length - 1] for length in LENGTHS])
    operands = {**_stored(exact, numbers, 1), "positions": positions, "q": randn(3, HEADS * exact.group, 1, exact.size, seed=5)}
    results = [torch.full_like(operands["q"], torch.nan) for _ in range(2)]
    for case, result in zip((exact, fast), results, strict=True):
        kernels(_long(case), {**operands, "out": result})
    largest = float((results[0] - results[1]).abs().max() / results[0].abs().max())
    assert 2.0**-17 < largest < 2.0**-10 if instruction_set == "avx512" else largest == 0.0
