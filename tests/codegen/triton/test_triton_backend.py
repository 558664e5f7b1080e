"""What the Triton backend refuses, and that it says why; layouts; no Triton needed to emit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qcompile.codegen.triton.backend import OPERATORS, TritonBackend
from qcompile.errors import ArtifactError, CoverageError, TargetError
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.reference import pack
from qcompile.quant.retention import Retention
from tests.codegen.triton import activation_specs, settled_specs, specs
from tests.codegen.triton.specs import with_format, with_option

BACKEND = TritonBackend("sm90")


@pytest.mark.parametrize("spec", [*specs.small_llama(), *specs.small_llama("int8 channel sym fp16")])
def test_a_llama_is_served(spec: KernelSpec) -> None:
    assert BACKEND.refuses(spec) is None


@pytest.mark.parametrize("preset", activation_specs.PRESETS)
def test_every_preset_of_quantized_activations_is_served(preset: str) -> None:
    assert [BACKEND.refuses(spec) for spec in activation_specs.small_llama(preset)] == [None] * 17


REFUSED = {
    "operator 'moe_experts' has no Triton kernel: expected one of linear, quantized_linear": specs.spec(
        "moe_experts", sizes={}, formats={}
    ),
    "weight is fp32: expected bf16 or fp16": with_format(specs.linear(8, 8, "m1"), weight="fp32"),
    "x is fp32: expected bf16 or fp16": with_format(specs.linear(8, 8, "m1"), x="fp32"),
    r"mixed storage \(x bf16, weight fp16, out bf16\): expected one type": with_format(specs.linear(8, 8, "m1"), weight="fp16"),
    "bucket '': expected one of 'm1', 'm2-63', 'm64'": replace(specs.linear(8, 8, "m1"), bucket=""),
    "codes are int5: expected int2 or int3 or int4 or int8": specs.quantized_linear(8, 64, "m1", "int5 g32 sym fp16"),
    "codes are int3: expected int4 or int8": specs.embedding(8, 64, "int3 g32 sym fp16"),
    "groups of 8 columns: expected at least 16": specs.quantized_linear(8, 64, "m1", "int4 g8 sym fp16"),
    "codes are 'nf4 g64': expected a format such as": specs.quantized_linear(8, 64, "m1", "nf4 g64"),
    "zero is None: expected uint8 for asymmetric codes": with_format(specs.quantized_linear(8, 64, "m1"), codes="int4 g64 asym fp16"),
    "scale is fp32: expected fp16": with_format(specs.quantized_linear(8, 64, "m1"), scale="fp32"),
    r"N·K = 4294967296: expected less than 2\^31": specs.linear(1 << 16, 1 << 16, "m1"),
    "D=512: expected a head size of at most 256": specs.attend(2, 1, 512, "m1"),
    "H=9: expected a multiple of the L=2": specs.attend(9, 2, 64, "m1"),
    "window=-1: expected 0": specs.attend(2, 1, 64, "m1", window=-1),
    r"mixed storage \(q bf16, keys fp16": with_format(specs.attend(2, 1, 64, "m1"), keys="fp16"),
    "R=63: expected an even number": specs.rope(2, 63),
    "K=40000: expected at most 32768 columns": specs.rms_norm(40000),
    "activation 'tanh': expected one of silu": specs.gated_activation(8, "tanh"),
    "k=65: expected 1 to 64": specs.topk(100, 65),
    "k=9: expected at most N=8": specs.topk(8, 9),
    "option 'eps' is missing": replace(specs.rms_norm(8), options=()),
    "option 'bias': expected one of scale, window, softcap": replace(specs.attend(2, 1, 64, "m1"), options=(("bias", 1), ("scale", 1.0))),
    "operand 'mask': expected one of q, keys": with_format(specs.attend(2, 1, 64, "m1"), mask="fp32"),
    "form is 'int3 t32 asym': expected fp8 or integers of 2, 4, 8 bits": settled_specs.settle(1, 64, "int3 t32 asym"),
    "form is 'bfp3 g16': expected codes of 2, 4 or 8 bits": settled_specs.settle(1, 64, "bfp3 g16"),
    "v_form is 'bfp4 g48': expected blocks of a power of two": settled_specs.attend_settled(2, 1, 96, "m1", ("int4", "bfp4 g48")),
    "bfp4 g16 sorted: expected the table tables_0, got none": with_option(
        settled_specs.settle(1, 64, "int4 g16", settled_specs.SINKS), form="bfp4 g16 sorted"
    ),
    "bfp4 g16: expected no table v_tables_0, got one": with_format(
        settled_specs.attend_settled(2, 1, 64, "m1", ("int4 g16 asym", "bfp4 g16"), settled_specs.SINKS), v_tables_0="uint8"
    ),
    "k_form: cache format 'int4 t': expected int2 to int8": with_option(settled_specs.attend_settled(2, 1, 64, "m1"), k_form="int4 t"),
    "v_form: groups of 24: expected a power of two": settled_specs.attend_settled(2, 1, 96, "m1", ("int4", "int4 g24 asym")),
    "form: groups of 2: expected a multiple of the 4 codes in a byte": settled_specs.settle(1, 64, "int2 t2 asym", Retention(0, 0, 2)),
    "form: groups of 256 tokens: expected at most 128": settled_specs.settle(1, 64, "int2 t256 asym", Retention(0, 0, 256)),
    "form is 'int8 sym': expected an even number of bytes where 1 tokens lie together, got 65": settled_specs.settle(1, 63, "int8 sym"),
    "group=16: expected a multiple of the 32 tokens": settled_specs.settle(1, 64, "int4 t32 asym", Retention(4, 32, 16)),
    "groups of 8 tokens: expected 1, or at least 16": settled_specs.attend_settled(
        2, 1, 64, "m1", ("int4 t8 asym", "int4"), Retention(4, 0, 8)
    ),
    "group=1: expected a multiple of the 32 tokens": settled_specs.attend_settled(2, 1, 64, "m1", policy=Retention(4, 32, 1)),
    r"first, recent, group = \[0, 0, 0\]: expected whole numbers": settled_specs.retain(1, 64, Retention(0, 0, 0)),
    "keep no token: expected an append to the pages": settled_specs.retain(1, 64, Retention(0, 0, 1)),
    "rows and tokens are bf16 and fp16: expected one type": with_format(settled_specs.retain(1, 64), exact="fp16"),
    r"mixed storage \(exact_keys fp16, exact_values bf16": with_format(settled_specs.attend_settled(2, 1, 64, "m1"), exact_keys="fp16"),
    "operand 'inv_freq': expected one of q, keys": with_format(settled_specs.attend_settled(2, 1, 64, "m1"), inv_freq="fp32"),
    "operand 'out' is missing": replace(specs.rms_norm(8), formats=(("x", "bf16"),)),
    "size K=0: expected a positive number": replace(specs.rms_norm(8), sizes=(("K", 0),)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_says_why(reason: str) -> None:
    spec = REFUSED[reason]
    assert BACKEND.refuses(spec) is not None
    with pytest.raises(CoverageError, match=reason):
        BACKEND.emit(spec)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(TargetError, match="'sm70': Triton kernels are built for sm80, sm89, sm90, sm100"):
        TritonBackend("sm70")


def test_emitting_imports_no_triton() -> None:
    code = (
        "import sys; from qcompile.codegen.triton.backend import TritonBackend; from qcompile.codegen.triton import build;"
        "from tests.codegen.triton import specs; TritonBackend('sm80').emit(specs.small_llama()[3]); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_operator_is_documented_by_its_source() -> None:
    for spec in specs.small_llama():
        source = BACKEND.emit(spec).source
        assert source.startswith(f'"""{spec.operator}')
        assert "for sm90" in source.splitlines()[0]
    assert {spec.operator for spec in specs.small_llama()} < set(OPERATORS)


@pytest.mark.parametrize("columns", [1, 63, 128, 130, 576])
def test_split_half_keeps_every_code(columns: int) -> None:
    codes = torch.randint(0, 16, (3, columns), dtype=torch.uint8)
    laid = apply_layout("split-half", pack(codes, 4))
    blocks = laid.view(3, -1, 1, 64)
    restored = torch.cat((blocks & 15, blocks >> 4), dim=2).reshape(3, -1)
    assert torch.equal(restored[:, :columns], codes)
    assert not bool(restored[:, columns:].any())


@pytest.mark.parametrize("columns", [1, 33, 128, 130, 576])
def test_split_quarter_and_split_planes_keep_every_code(columns: int) -> None:
    codes = torch.randint(0, 4, (3, columns), dtype=torch.uint8)
    blocks = apply_layout("split-quarter", pack(codes, 2)).view(3, -1, 1, 32)
    restored = torch.cat([(blocks >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(3, -1)
    assert torch.equal(restored[:, :columns], codes)
    assert not bool(restored[:, columns:].any())
    codes = torch.randint(0, 8, (3, columns), dtype=torch.uint8)
    blocks = apply_layout("split-planes", pack(codes, 3)).view(3, -1, 1, 48)
    low = torch.cat([(blocks[..., :32] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(3, -1)
    third = torch.cat([(blocks[..., 32:] >> shift) & 1 for shift in range(8)], dim=2).reshape(3, -1)
    assert torch.equal((low | third << 2)[:, :columns], codes)
    assert not bool((low | third)[:, columns:].any())


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ArtifactError, match="layout 'tiled': expected one of split-half"):
        apply_layout("tiled", torch.zeros(1, 1, dtype=torch.uint8))
