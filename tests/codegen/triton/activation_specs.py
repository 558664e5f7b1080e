"""Specifications of the operators of quantized activations, the way the lowering pass builds them."""

from __future__ import annotations

from qcompile.ir.lowered import KernelSpec
from qcompile.quant.hadamard import hadamard_factors
from tests.codegen.triton.specs import spec


def order(size: int) -> int:
    """The order of the matrix of a rotation of `size` channels; 1 for none."""
    return hadamard_factors(size)[0] if size else 1


def rotation(size: int) -> tuple[dict[str, int], dict[str, str | None]]:
    """The sizes and the formats that a rotation adds."""
    if order(size) == 1:
        return {}, {}
    return {"M": order(size)}, {"matrix": "fp32"}


def hadamard(columns: int, size: int, dtype: str = "bf16") -> KernelSpec:
    """A rotation alone."""
    sizes, formats = rotation(size)
    return spec("hadamard", sizes={"K": columns, **sizes}, formats={"x": dtype, "out": dtype, **formats}, hadamard_size=size)


def scale_kind(group: int) -> str:
    """What dynamic scales of activations are stored in."""
    return "fp32" if group == -1 else "fp16"


def quantize(
    operator: str,
    columns: int,
    size: int = 0,
    *,
    bits: int = 8,
    group: int = -1,
    element: str = "int",
    clip: float = 1.0,
    dtype: str = "bf16",
) -> KernelSpec:
    """Any operator of one row that ends in codes and scales."""
    sizes, formats = rotation(size)
    producer = operator.removesuffix("_asym")
    sources: dict[str, dict[str, str | None]] = {
        "norm_quantize": {"x": dtype, "weight": dtype},
        "add_norm_quantize": {"x": dtype, "residual": dtype, "weight": dtype},
        "gated_quantize": {"gate": dtype, "up": dtype},
    }
    codes = "fp8e4nv" if element == "fp8" else "i8"
    results = [codes, scale_kind(group), *(["i32"] if producer != operator else [])]
    if producer == "add_norm_quantize":
        results.insert(0, dtype)
    formats |= sources.get(producer, {"x": dtype}) | {f"out{place or ''}": kind for place, kind in enumerate(results)}
    options: dict[str, object] = {"bits": bits, "group_size": group, "clip": clip}
    if producer == operator:
        options["element"] = element
    if not operator.startswith("quantize_activation"):
        options["hadamard_size"] = size
    if "norm" in operator:
        options |= {"eps": 1e-5, "offset": 0.0}
    if producer == "gated_quantize":
        options["activation"] = "silu"
    return spec(operator, sizes={"K": columns, **sizes}, formats=formats, **options)


def quantize_static(columns: int, *, zero: bool, element: str = "int", bits: int = 8, dtype: str = "bf16") -> KernelSpec:
    """Codes by one scale for the whole tensor."""
    formats = {"x": dtype, "scale": "fp32", "zero": "i32" if zero else None, "out": "fp8e4nv" if element == "fp8" else "i8"}
    return spec("quantize_static", sizes={"K": columns}, formats=formats, bits=bits, element=element)


def code_linear(
    rows: int, columns: int, bucket: str, form: str = "int8 channel sym fp16", *, group: int = -1, zero: bool = False, static: bool = False,
    bias: bool = False, dtype: str = "bf16",
) -> KernelSpec:  # fmt: skip
    """A linear over quantized activations: `float8_linear` for an fp8 weight, else `integer_linear`."""
    float8 = form.startswith("fp8")
    formats = {
        "codes": "fp8e4nv" if float8 else "i8",
        "scale": scale_kind(group),
        "zero": "i32" if zero else None,
        "w_codes": form,
        "w_scale": form.rsplit(" ", maxsplit=1)[-1],
        "w_zero": "uint8" if " asym " in form else None,
        "bias": dtype if bias else None,
        "out": dtype,
    }
    operator = "float8_linear" if float8 else "integer_linear"
    return spec(operator, bucket, sizes={"N": rows, "K": columns}, formats=formats, group_size=group, static=static)


PRESETS: dict[str, tuple[str, int, str]] = {
    "w8a8": ("int8 channel sym fp16", -1, "int"),
    "w4a8": ("int4 g64 sym fp16", -1, "int"),
    "w4a4": ("int4 g64 sym fp16", 64, "int"),
    "fp8": ("fp8 channel sym fp16", -1, "fp8"),
}
"""Scheme -> format of its weights, groups of its activations, and their element."""


def small_llama(preset: str) -> list[KernelSpec]:
    """What a scheme with quantized activations adds to `specs.small_llama`: its linears, and what makes their inputs."""
    form, group, element = PRESETS[preset]
    bits = 4 if preset.endswith("a4") else 8
    shapes = ((576, 576), (192, 576), (1536, 576), (576, 1536))
    return [
        *(code_linear(rows, columns, bucket, form, group=group) for rows, columns in shapes for bucket in ("m1", "m2-63", "m64")),
        quantize("norm_quantize", 576, bits=bits, group=group, element=element),
        quantize("add_norm_quantize", 576, bits=bits, group=group, element=element),
        quantize("quantize_activation", 576, bits=bits, group=group, element=element),
        quantize("hadamard_quantize", 576, 64, bits=bits, group=group, element=element),
        quantize("gated_quantize", 1536, 1536, bits=bits, group=group, element=element),
    ]
