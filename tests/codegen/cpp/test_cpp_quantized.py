"""Kernels of quantized activations, for every instruction set that runs here.

Codes, scales and integer products are the definition's bit for bit; what is fused gives the bits of its parts; rotations and norms are
within bounds of float64.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from qcompile import compile as compile_model
from qcompile.codegen.cpp import build
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.ir import activation_ops as _activation_ops  # noqa: F401  registers operators of quantized activations
from qcompile.ir import hadamard_ops as _hadamard_ops  # noqa: F401  registers the rotation
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.format import parse_format
from qcompile.quant.hadamard import hadamard_factors, mixing_matrix
from qcompile.quant.reference import quantize
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.native import NativeEngine
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton.specs import rms_norm, spec, with_format, with_option
from tests.models import tiny

qcompile = torch.ops.qcompile
UNIT = 2.0**-24
FLOAT = "fp32"
ROWS = 5
each_set = pytest.mark.parametrize("instruction_set", RUNNABLE)

RANGES = [
    # columns, bits, columns of a group, clip
    (576, 8, -1, 1.0), (100, 8, 36, 1.0), (37, 4, -1, 0.9), (48, 4, 16, 0.9), (7, 8, 64, 1.0), (33, 3, 5, 1.0), (16, 2, -1, 1.0),
]  # fmt: skip
SIZES = ((64, 64), (576, 576), (96, 48), (72, 36), (74, 37), (256, 8), (1536, 1536), (12, 4), (30, 2))
"""Columns, and those that are rotated together: 36 x 16, 12 x 4, one odd number, many powers of two, fewer than a vector."""
FUSED = [(576, 576, 8, -1), (96, 48, 4, 32), (37, 0, 8, -1)]
"""Columns, rotation, bits, group."""
FORMS = (
    "int8 channel sym fp32", "int4 g64 sym fp16", "int4 g36 asym fp16", "int8 g16 asym bf16", "int2 channel asym fp32", "int4 g18 sym fp16",
)  # fmt: skip
LINEARS = [
    *product(FORMS, ("row", "moved")), ("int8 channel sym fp32", "static"), ("int4 g36 asym fp16", "static"),
    ("int8 channel sym fp32", "groups"), ("int4 g36 sym fp16", "groups"), ("int4 g72 asym fp16", "moved groups"),
    ("int4 g36 min fp16", "groups"), ("int8 g72 min bf16", "moved groups"), ("int4 channel min fp32", "row"),
    ("int4 g32 sym fp16", "groups of 32"), ("int4 g64 asym fp16", "groups of 32"), ("int4 g32 min fp16", "groups of 32"),
    ("int8 g32 sym fp16", "groups of 32"), ("int2 g64 asym fp16", "moved groups of 32"),
    ("int5 g32 sym fp16", "groups of 32"), ("int3 g64 asym fp16", "moved groups of 32"), ("int6 g32 min fp16", "groups of 32"),
    ("int7 g32 sym fp16", "groups of 32"), ("int5 g36 asym fp16", "groups"),
]  # fmt: skip
SHAPES = ((33, 71), (48, 576))
COUNTS = (1, 2, 13)


def quantized(
    producer: str, columns: int, bits: int, group: int, *, size: int | None = None, asym: bool = False, clip: float = 1.0
) -> KernelSpec:
    """A specification of `quantize_activation` and the kernels that fuse it; `size` is the rotation."""
    sources = {"gated": ("gate", "up"), "add_norm": ("x", "residual", "weight"), "norm": ("x", "weight")}.get(producer, ("x",))
    order = hadamard_factors(size)[0] if size else 1
    formats: dict[str, str | None] = dict.fromkeys(sources, FLOAT) | {"matrix": FLOAT if order > 1 else None}
    kinds = [*([FLOAT] if producer == "add_norm" else []), "i8", FLOAT if group == -1 else "fp16", *(["i32"] if asym else [])]
    formats |= {f"out{place or ''}": kind for place, kind in enumerate(kinds)}
    options = {"eps": 1e-5, "offset": 0.0} if "norm" in producer else {"activation": "silu"} if producer == "gated" else {}
    options |= {} if size is None else {"hadamard_size": size}
    sizes = {"K": columns} | ({"M": order} if order > 1 else {})
    name = {"": "quantize_activation"}.get(producer, f"{producer}_quantize") + ("_asym" if asym else "")
    return spec(name, sizes=sizes, formats=formats, bits=bits, group_size=group, clip=clip, **options)


def hadamard(columns: int, size: int) -> KernelSpec:
    """A rotation."""
    order = hadamard_factors(size)[0]
    sizes = {"K": columns} | ({"M": order} if order > 1 else {})
    formats = {"x": FLOAT, "matrix": FLOAT if order > 1 else None, "out": FLOAT}
    return spec("hadamard", sizes=sizes, formats=formats, hadamard_size=size)


def static(columns: int, bits: int, zero: bool) -> KernelSpec:
    """Codes by constants."""
    formats = {"x": FLOAT, "scale": FLOAT, "zero": "i32" if zero else None, "out": "i8"}
    return spec("quantize_static", sizes={"K": columns}, formats=formats, bits=bits)


def linear(form: str, kind: str, count: int, columns: int, rows: int, bias: bool = True) -> KernelSpec:
    """A product of codes; groups of activations have 36 columns where `kind` does not say 32."""
    grouped, stored = "groups" in kind, form.rsplit(" ", 1)[1]
    formats = {
        "codes": "i8", "scale": "fp16" if grouped else FLOAT, "zero": "i32" if "moved" in kind or kind == "static" else None,
        "w_codes": form, "w_scale": stored, "w_zero": "uint8" if "asym" in form else stored if "min" in form else None,
        "bias": FLOAT if bias else None, "out": FLOAT,
    }  # fmt: skip
    sizes = {"N": count, "K": columns}
    group = group_of(kind)
    return spec("integer_linear", "m1" if rows == 1 else "m2-63", sizes=sizes, formats=formats, group_size=group, static=kind == "static")


def group_of(kind: str) -> int:
    """Columns of activations that share a scale."""
    return -1 if "groups" not in kind else 32 if "32" in kind else 36


def layer_norm(columns: int, affine: bool) -> KernelSpec:
    """A layer norm."""
    formats = {"x": FLOAT, "weight": FLOAT if affine else None, "bias": FLOAT if affine else None, "out": FLOAT}
    return spec("layer_norm", sizes={"K": columns}, formats=formats, eps=1e-5)


def gather(columns: int, kind: str) -> KernelSpec:
    """The last row of each sequence."""
    return spec("gather_last", sizes={"K": columns}, formats={"x": kind, "positions": "i64", "out": kind})


GATHERED = {"i8": torch.int8, "i32": torch.int32, "fp16": torch.float16, FLOAT: torch.float32}
PRODUCERS = ("norm", "add_norm", "gated", "hadamard")


def _fused_specs() -> list[KernelSpec]:
    found = []
    for columns, size, bits, group in FUSED:
        for asym in (False, True):
            found += [quantized(name, columns, bits, group, size=size, asym=asym) for name in PRODUCERS]
            found.append(quantized("", columns, bits, group, asym=asym))
        found += [hadamard(columns, size)] if size else []
        found += [rms_norm(columns, FLOAT), rms_norm(columns, FLOAT, residual=True)]
        found.append(spec("gated_activation", sizes={"I": columns}, formats=dict.fromkeys(("gate", "up", "out"), FLOAT), activation="silu"))
    return found


@cache
def library(instruction_set: str) -> Kernels:
    """The kernels of this file but the linear ones."""
    ranges = [quantized("", *case[:3], clip=case[3], asym=asym) for case in RANGES for asym in (False, True)]
    others = [
        *(gather(9, kind) for kind in GATHERED),
        *(static(53, bits, zero) for bits in (4, 8) for zero in (False, True)),
        layer_norm(100, True),
        layer_norm(33, False),
    ]
    return library_of(
        [quantized("", 48, 4, -1), *ranges, *others, *(hadamard(*case) for case in SIZES), *_fused_specs()], instruction_set, "-O0"
    )


@cache
def products(instruction_set: str) -> Kernels:
    """The linear kernels of this file."""
    cases = [linear(*case, *shape, rows) for case in LINEARS for shape in SHAPES for rows in COUNTS]
    return library_of(cases, instruction_set, "-O0")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel is to fill."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 77, dtype=dtype)


def code_results(made: KernelSpec, columns: int, rows: int = ROWS) -> dict[str, Tensor]:
    """Tensors for the results of a kernel that makes codes, by operand."""
    group = int(made.option("group_size"))
    groups = 1 if group == -1 else -(-columns // group)
    found = {}
    for name, kind in made.formats:
        if name.startswith("out"):
            wide = kind == "i8" or (name == "out" and "add" in made.operator)
            found[name] = empty(rows, columns if wide else groups, dtype=GATHERED[kind])
    return found


@each_set
@pytest.mark.parametrize(("kind", "dtype"), GATHERED.items())
def test_rows_of_codes_are_gathered(kind: str, dtype: torch.dtype, instruction_set: str) -> None:
    x, positions = (50 * randn(3, 4, 9)).to(dtype), torch.tensor([[-1, 0, 1, 2], [5, 6, -1, -1], [0, 1, 2, 3]])
    out = empty(3, 1, 9, dtype=dtype)
    library(instruction_set)(gather(9, kind), {"x": x, "positions": positions, "out": out})
    assert torch.equal(out[:, 0], torch.stack([x[0, 3], x[1, 1], x[2, 3]]))


def awkward(columns: int, seed: int = 0) -> Tensor:
    """Rows with exact ties, zeros, one sign only, tiny and huge numbers."""
    x = randn(ROWS, columns, seed=seed)
    x[0] = torch.arange(columns) % 9 - 4.0
    x[0, 0] = 8.0  # the lowest code stands for 8, so that of 8 bits is 1/16: and halves of it are ties of 4 bits
    x[1] = 0.0
    x[2] = x[2].abs() * 1e-7
    x[3] = -x[3].abs() * 1e6
    return x


@each_set
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("columns", "bits", "group", "clip"), RANGES)
def test_codes_are_the_definitions_bit_for_bit(columns: int, bits: int, group: int, clip: float, asym: bool, instruction_set: str) -> None:
    x, made = awkward(columns), quantized("", columns, bits, group, clip=clip, asym=asym)
    given = code_results(made, columns)
    library(instruction_set)(made, {"x": x, **given})
    expected = (
        qcompile.quantize_activation_asym(x, bits, group, clip) if asym else qcompile.quantize_activation(x, bits, group, "int", clip)
    )
    for exact, got in zip(expected, given.values(), strict=True):
        assert torch.equal(got, exact)


def test_rounding_meets_ties() -> None:
    """What the test above is worth: half of the numbers of a row lie between two codes."""
    x = awkward(48)
    scale = qcompile.quantize_activation(x, 4, -1)[1]
    x[0] = (torch.arange(48) % 15 - 7.5) * scale[0]
    x[0, 0] = 8 * -scale[0]
    codes, again = qcompile.quantize_activation(x, 4, -1)
    assert torch.equal(again[0], scale[0])
    assert int(((x[0] / scale[0]).frac().abs() == 0.5).sum()) >= 40
    made = quantized("", 48, 4, -1)
    for instruction_set in RUNNABLE:
        given = code_results(made, 48)
        library(instruction_set)(made, {"x": x, **given})
        assert torch.equal(given["out"], codes)


@each_set
@pytest.mark.parametrize(("bits", "zero"), list(product((4, 8), (False, True))))
def test_static_codes_are_the_definitions(bits: int, zero: bool, instruction_set: str) -> None:
    x, scale, middle = 20 * randn(3, 2, 53), torch.tensor([0.11]), torch.tensor([-5], dtype=torch.int32) if zero else None
    x[0, 0, :3] = torch.tensor([1e30, -1e30, 0.055])
    out = empty(3, 2, 53, dtype=torch.int8)
    library(instruction_set)(static(53, bits, zero), {"x": x, "scale": scale, "out": out} | ({} if middle is None else {"zero": middle}))
    assert torch.equal(out, qcompile.quantize_static(x, scale, middle, bits))


@each_set
@pytest.mark.parametrize(("columns", "size"), SIZES)
def test_rotations(columns: int, size: int, instruction_set: str) -> None:
    matrix, (order, twos) = mixing_matrix(size), hadamard_factors(size)
    x, out = randn(ROWS, columns), empty(ROWS, columns)
    given = {"x": x, "out": out} | ({} if matrix is None else {"matrix": matrix.float().contiguous()})
    library(instruction_set)(hadamard(columns, size), given)
    stored = None if matrix is None else matrix.float().double()
    exact = qcompile.hadamard(x.double(), stored, size)
    magnitudes = (torch.ones(1, 1).double() if stored is None else stored.abs(), torch.ones(2**twos, 2**twos).double() / 2 ** (twos / 2))
    sums = x.double().abs().view(-1, size) @ torch.kron(*magnitudes).t()
    # A number meets `order` sums that are rounded once (twice where products are not fused), a product, and a sum in each round.
    bound = (2 * order + twos + 2) * UNIT * sums.view(ROWS, columns)
    assert bool(((out - exact).abs() <= bound).all())


@each_set
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize(("columns", "size", "bits", "group"), FUSED)
def test_fused_kernels_give_the_bits_of_their_parts(
    columns: int, size: int, bits: int, group: int, producer: str, asym: bool, instruction_set: str
) -> None:
    run = library(instruction_set)
    x, other, weight = randn(ROWS, columns), randn(ROWS, columns, seed=1), randn(columns, seed=2)
    matrix = mixing_matrix(size) if size else None
    rotation = {} if matrix is None else {"matrix": matrix.float().contiguous()}
    row, total = empty(ROWS, columns), empty(ROWS, columns)
    sources = {"x": x, "residual": other, "weight": weight}
    if producer == "gated":
        sources = {"gate": x, "up": other}
        formats: dict[str, str | None] = dict.fromkeys(("gate", "up", "out"), FLOAT)
        run(spec("gated_activation", sizes={"I": columns}, formats=formats, activation="silu"), {**sources, "out": row})
    elif producer == "hadamard":
        row = x
    else:
        summed = producer == "add_norm"
        run(rms_norm(columns, FLOAT, residual=summed), {**sources, **({"out": total, "out1": row} if summed else {"out": row})})
    if size:
        rotated = empty(ROWS, columns)
        run(hadamard(columns, size), {"x": row, **rotation, "out": rotated})
        row = rotated
    made = quantized(producer, columns, bits, group, size=size, asym=asym)
    parts = quantized("", columns, bits, group, asym=asym)
    expected, got = code_results(parts, columns), code_results(made, columns)
    run(parts, {"x": row, **expected})
    run(made, {**sources, **rotation, **got})
    results = list(got.values())
    if producer == "add_norm":
        assert torch.equal(results.pop(0), total)
    for one, another in zip(results, expected.values(), strict=True):
        assert torch.equal(one, another)


def _operands(form: str, kind: str, count: int, columns: int, rows: int, bias: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Operands of a product of codes, and what it is."""
    stored = parse_format(form)
    packed = quantize(randn(count, columns, seed=1), stored)
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (rows, columns), generator=draw, dtype=torch.int8)
    codes[0] = -128  # with the weight's extremes, what saturates in 16 bits
    group = group_of(kind)
    groups = 1 if group == -1 else -(-columns // group)
    shape = (1,) if kind == "static" else (rows, groups)
    scale = randn(*shape, seed=4).to(torch.float16 if "groups" in kind else torch.float32)
    moved = "moved" in kind or kind == "static"
    zero = torch.randint(-128, 128, shape, generator=draw, dtype=torch.int32) if moved else None
    shift = randn(count, seed=5) if bias else None
    given = {
        "codes": codes, "scale": scale, "zero": zero, "bias": shift,
        "w_codes": packed.codes, "w_scale": packed.scale, "w_zero": packed.zero,
    }  # fmt: skip
    bits, size = stored.element.bits, stored.granularity.group_size
    exact = qcompile.integer_linear(codes, scale, zero, packed.codes, packed.scale, packed.zero, shift, group, bits, size, torch.float32)
    return {name: tensor for name, tensor in given.items() if tensor is not None}, exact


@each_set
@pytest.mark.parametrize(("count", "columns"), SHAPES)
@pytest.mark.parametrize(("form", "kind"), LINEARS)
def test_products_of_codes_are_the_definitions_bit_for_bit(form: str, kind: str, count: int, columns: int, instruction_set: str) -> None:
    for rows in COUNTS:
        given, exact = _operands(form, kind, count, columns, rows, bias=True)
        out = empty(rows, count)
        products(instruction_set)(linear(form, kind, count, columns, rows), {**given, "out": out})
        assert torch.equal(out, exact)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_best_products_as_users_get_them(threads: int) -> None:
    """Optimized, without a bias, rows of a view."""
    made = [linear("int4 g64 sym fp16", "row", 70, 576, rows, bias=False) for rows in (1, 13)]
    made.append(linear("int8 channel sym fp32", "moved", 33, 100, 13, bias=False))
    run = library_of(made, RUNNABLE[0], "-O3")
    for one, rows in zip(made, (1, 13, 13), strict=True):
        kind, (count, columns) = ("moved", (33, 100)) if one is made[2] else ("row", (70, 576))
        given, exact = _operands(str(one.format("w_codes")), kind, count, columns, rows, bias=False)
        wide = torch.zeros(rows, 2, columns + 9, dtype=torch.int8)
        wide[:, 1, :columns] = given["codes"]
        out = empty(rows, count)
        run(one, {**given, "codes": wide[:, 1, :columns], "out": out}, threads)
        assert torch.equal(out, exact)


@pytest.mark.parametrize("form", ["int8 channel sym fp32", "int4 g36 asym fp16"])
def test_products_without_any_instruction_of_x86(form: str) -> None:
    made = linear(form, "moved", 17, 71, 2)
    given, exact = _operands(form, "moved", 17, 71, 2, bias=True)
    out = empty(2, 17)
    library_of([made], "portable", "-U__SSE2__")(made, {**given, "out": out})
    assert torch.equal(out, exact)


@each_set
@pytest.mark.parametrize(("columns", "affine"), [(100, True), (33, False)])
def test_layer_norms(columns: int, affine: bool, instruction_set: str) -> None:
    x, weight, bias = 3 + randn(ROWS, columns), randn(columns, seed=1), randn(columns, seed=2)
    out = empty(ROWS, columns)
    library(instruction_set)(layer_norm(columns, affine), {"x": x, "out": out} | ({"weight": weight, "bias": bias} if affine else {}))
    given = [part.double() if affine else None for part in (weight, bias)]
    exact = torch.nn.functional.layer_norm(x.double(), (columns,), *given, eps=1e-5)
    # The mean rounds like a sum over lanes of a quarter of the row, beside a deviation of 1; so do the squares.
    size = x.double().abs().mean(-1, keepdim=True) * (weight.double().abs() if affine else 1)
    bound = (columns / 4 + 12) * UNIT * (exact.abs() + 2 * size + (bias.double().abs() if affine else 0))
    assert bool(((out - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (with_option(quantized("", 16, 8, -1), element="fp8"), "codes are fp8 of 8 bits"),
        (with_option(quantized("", 16, 8, -1), bits=9), "codes are int of 9 bits"),
        (with_option(quantized("", 16, 8, -1), group_size=0), "group_size=0"),
        (with_option(quantized("", 16, 8, -1), group_size=8), "out1 is fp32: expected fp16"),
        (quantized("", 1 << 17, 8, -1), "expected at most 65536 columns"),
        (with_option(hadamard(64, 64), hadamard_size=48), "expected a divisor of K=64"),
        (with_option(hadamard(72, 36), hadamard_size=24), "expected M=36 times a power of two"),
        (linear("nf4 g32 sym fp32", "row", 16, 32, 1), "the weight's codes are nf4 g32 sym fp32: expected int2 to int8 with scales of"),
        (with_format(linear("int8 g32 sym e8m0", "row", 16, 64, 1), w_scale="float8_e8m0fnu"), "the weight's codes are int8 g32 sym e8m0"),
        (with_format(linear("int4 g32 asym fp16", "row", 16, 64, 1), w_zero="fp16"), "the weight's zero is fp16: expected uint8"),
        (linear("int4 g32 sym fp16", "groups", 16, 144, 1), "groups of 32 and 36 columns"),
        (linear("int8 channel sym fp32", "row", 16, 1 << 16, 1), "expected at most 32768 columns"),
        (with_option(linear("int8 channel sym fp32", "groups", 16, 72, 1), static=True), "expected one a group"),
    ],
)
def test_what_is_not_served_is_refused(refused: KernelSpec, reason: str) -> None:
    assert reason in (CppBackend().refuses(refused) or "")


@pytest.mark.parametrize(("target", "recipe"), [("cpu-w8a8", "nearest"), ("cpu-w4a8", "best")])
def test_a_llama_runs_wholly_native(target: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "instruction_sets", lambda: RUNNABLE[:1])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    model = compile_model(tiny("llama"), target, recipe=recipe, engine="native", max_batch=3, max_context=32)
    native, reference = (make_engine(model.contents, name=name, max_batch=3, max_context=32) for name in ("native", "reference"))
    assert isinstance(native, NativeEngine)
    assert {name: len(runs) for name, runs in native._runs.items()} == {"forward": 1, "prefill": 1, "decode": 1}
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    made, exact = native.prefill(prompts), reference.prefill(prompts)
    for _ in range(4):
        # No number of this model lies so near to a tie that its code differs: what is left is rounding.
        assert float((made - exact).abs().max() / exact.abs().max()) < 1e-6
        tokens = exact.argmax(-1).tolist()
        assert made.argmax(-1).tolist() == tokens
        made, exact = native.decode(tokens), reference.decode(tokens)
