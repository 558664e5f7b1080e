"""What kernels over packed caches refuse, and that they say why."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.errors import CoverageError
from tests.codegen.triton import cache_specs as specs
from tests.codegen.triton.specs import with_format, with_option

ATTEND, APPEND = specs.attend_packed(4, 2, 64, "m1"), specs.append_packed(2, 64)


REFUSED = {
    "int4 t32 asym: expected scales per token, got 32 tokens encoded together": with_option(ATTEND, k_form="int4 t32 asym"),
    "int3 g64 asym: expected codes of 2, 4 or 8 bits": with_option(ATTEND, v_form="int3 g64 asym"),
    "cache format 'int4 g': expected int2 to int8 or fp8": with_option(ATTEND, k_form="int4 g"),
    "int8 static: expected a form whose scales or powers stand beside its codes": with_option(ATTEND, k_form="int8 static"),
    "bfp3 g16: expected codes of 2, 4 or 8 bits": with_option(ATTEND, k_form="bfp3 g16"),
    "bfp4 g48: expected blocks of a power of two, 2 channels or more, got 48": specs.attend_packed(4, 2, 96, "m1", "bfp4 g48"),
    "bfp2 g2: expected blocks of a power of two, 4 channels or more, got 2": with_option(ATTEND, k_form="bfp2 g2"),
    "bfp4 g16 sorted: expected a head size of at most 256": specs.append_packed(2, 512, specs.SORTED),
    "bfp4 g16 sorted: expected the table k_tables_0, got none": with_option(ATTEND, k_form=specs.SORTED),
    "int4 g64 asym: expected no table v_tables_0, got one": with_format(ATTEND, v_tables_0="uint8"),
    "hadamard_size=64: expected keys that are rotated before, as they are read in the order of k_tables_0": with_option(
        specs.append_packed(2, 64, specs.SORTED), hadamard_size=64
    ),
    "int4 g5 asym: expected groups of whole bytes, a multiple of 2 channels": specs.attend_packed(4, 2, 65, "m1", "int4 g5 asym"),
    "int4 g4 sym: expected at most 8 groups in 64 numbers": with_option(ATTEND, k_form="int4 g4 sym"),
    "operand 'k_tables_1': expected one of q, keys, values, k_tables_0": with_format(ATTEND, k_tables_1="fp32"),
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
