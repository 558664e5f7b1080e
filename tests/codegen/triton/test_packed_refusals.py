"""What kernels over packed caches refuse, and that they say why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.errors import CoverageError
from qcompile.ir.lowered import KernelSpec
from tests.codegen.triton import cache_specs as specs
from tests.codegen.triton.specs import with_format

ATTEND, APPEND = specs.attend_packed(4, 2, 64, "m1"), specs.append_packed(2, 64)


def with_option(spec: KernelSpec, **options: object) -> KernelSpec:
    """The specification with other or more options."""
    return replace(spec, options=tuple(sorted({**dict(spec.options), **options}.items())))


REFUSED = {
    "int4 t32 asym: expected scales per token, got 32 tokens encoded together": with_option(ATTEND, k_form="int4 t32 asym"),
    "int3 g64 asym: expected codes of 2, 4 or 8 bits": with_option(ATTEND, v_form="int3 g64 asym"),
    "cache format 'int4 g': expected int2 to int8 or fp8": with_option(ATTEND, k_form="int4 g"),
    "int8 static: expected a form whose scales stand beside its codes": with_option(ATTEND, k_form="int8 static"),
    "int4 g5 asym: expected groups of whole bytes, a multiple of 2 channels": specs.attend_packed(4, 2, 65, "m1", "int4 g5 asym"),
    "int4 g4 sym: expected at most 8 groups in 64 numbers": with_option(ATTEND, k_form="int4 g4 sym"),
    "option 'k_tables': expected one of k_form, v_form, scale": with_option(ATTEND, k_tables=2),
    "operand 'inv_freq': expected one of q, keys": with_format(ATTEND, inv_freq="fp32"),
    "keys is bf16: expected uint8": with_format(ATTEND, keys="bf16"),
    r"mixed storage \(q bf16, out fp16\)": with_format(ATTEND, out="fp16"),
    "H=4: expected a multiple of the L=3": specs.attend_packed(4, 3, 64, "m1"),
    "operand 'matrix': expected one of keys": with_format(APPEND, matrix="fp32"),
    "hadamard_size=48: expected a power of two that divides D=96": specs.append_packed(2, 96, "int8 sym", rotated=48),
    "hadamard_size=64: expected a power of two that divides D=96": specs.append_packed(2, 96, "int8 sym", rotated=64),
    "int8 g48 sym: expected groups of a power of two to pack, got 48 of 96": specs.append_packed(2, 96, "int8 g48 sym"),
    "D=2048: expected a head size of at most 1024": specs.append_packed(2, 2048, "int8 sym"),
    r"mixed storage \(k bf16, v fp16\)": with_format(APPEND, v="fp16"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_says_why(reason: str) -> None:
    with pytest.raises(CoverageError, match=reason):
        TritonBackend("sm90").emit(REFUSED[reason])


@pytest.mark.parametrize("form", [specs.KV4, specs.KV8, specs.KVFP8])
def test_an_older_gpu_serves_every_format(form: str) -> None:
    """Codes of 8-bit floats are made and read by their bits: no instruction that sm80 lacks."""
    for spec in (specs.attend_packed(4, 2, 64, "m1", form), specs.append_packed(2, 64, form)):
        assert TritonBackend("sm80").refuses(spec) is None
