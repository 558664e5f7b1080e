"""Norms, activations, rotary positions, embeddings and the search for the largest logits, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.ir import ops
from qcompile.quant.format import parse_format
from qcompile.quant.reference import dequantize, quantize
from qcompile.quant.scheme import DTYPE_NAMES
from tests.codegen.triton import specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel


def random(*shape: int, dtype: str = "bf16") -> Tensor:
    """Normal numbers in a type."""
    return guarded(torch.randn(*shape).to(DTYPE_NAMES[dtype]))


@pytest.mark.parametrize(
    ("columns", "dtype", "weight", "offset"), [(576, "bf16", True, 0.0), (77, "fp16", True, 1.0), (64, "bf16", False, 0.0)]
)
def test_rms_norm(columns: int, dtype: str, weight: bool, offset: float) -> None:
    torch.manual_seed(0)
    operands = {
        "x": random(3, columns, dtype=dtype),
        "weight": random(columns, dtype=dtype),
        "out": result((3, columns), DTYPE_NAMES[dtype]),
    }
    run_kernel(specs.rms_norm(columns, dtype, weight=weight, offset=offset), operands, {"rows": 3})
    expected = ops.rms_norm(operands["x"].double(), operands["weight"].double() if weight else None, 1e-5, offset)
    assert_close(operands["out"], expected)


@pytest.mark.parametrize(("columns", "dtype"), [(576, "bf16"), (100, "fp16")])
def test_add_rms_norm(columns: int, dtype: str) -> None:
    torch.manual_seed(0)
    kind = DTYPE_NAMES[dtype]
    operands = {name: random(2, columns, dtype=dtype) for name in ("x", "residual")}
    operands |= {"weight": random(columns, dtype=dtype), "out": result((2, columns), kind), "out1": result((2, columns), kind)}
    run_kernel(specs.rms_norm(columns, dtype, residual=True), operands, {"rows": 2})
    total = operands["x"] + operands["residual"]
    assert torch.equal(operands["out"], total)
    assert_close(operands["out1"], ops.rms_norm(total.double(), operands["weight"].double(), 1e-5))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool) -> None:
    torch.manual_seed(0)
    operands = {"x": random(2, 90), "weight": random(90), "bias": random(90), "out": result((2, 90), torch.bfloat16)}
    formats = {"x": "bf16", "weight": "bf16", "bias": "bf16" if bias else None, "out": "bf16"}
    run_kernel(specs.spec("layer_norm", sizes={"K": 90}, formats=formats, eps=1e-5), operands, {"rows": 2})
    wide = {name: operands[name].double() for name in ("x", "weight", "bias")}
    expected = torch.nn.functional.layer_norm(wide["x"], (90,), wide["weight"], wide["bias"] if bias else None, 1e-5)
    assert_close(operands["out"], expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation_over_halves_of_one_matrix(activation: str) -> None:
    torch.manual_seed(0)
    fused = random(3, 160, dtype="fp16")
    operands = {"gate": fused[:, :80], "up": fused[:, 80:], "out": result((3, 80), torch.float16)}
    run_kernel(specs.gated_activation(80, activation, "fp16"), operands, {"rows": 3})
    assert_close(operands["out"], ops.gated_activation(fused[:, :80].double(), fused[:, 80:].double(), activation))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activation_at_large_and_small_numbers(activation: str) -> None:
    operands = {"x": guarded(torch.tensor([[-60000.0, -40.0, -1.0, 0.0, 0.5, 3.0, 40.0, 60000.0, 1e-4]]).half())}
    operands["out"] = result((1, 9), torch.float16)
    formats = {"x": "fp16", "out": "fp16"}
    run_kernel(specs.spec("activation", sizes={"K": 9}, formats=formats, activation=activation), operands, {"rows": 1})
    expected = ops.ACTIVATIONS[activation](operands["x"].double())
    assert torch.allclose(operands["out"].double(), expected, rtol=2**-10, atol=1e-6)


def test_add() -> None:
    operands = {"x": random(3, 50), "y": random(3, 50), "out": result((3, 50), torch.bfloat16)}
    run_kernel(specs.spec("add", sizes={"K": 50}, formats={"x": "bf16", "y": "bf16", "out": "bf16"}), operands, {"rows": 3})
    assert torch.equal(operands["out"], operands["x"] + operands["y"])


@pytest.mark.parametrize(("frequencies", "dtype"), [(32, "bf16"), (40, "fp32")])
def test_rotary_table(frequencies: int, dtype: str) -> None:
    positions = guarded(torch.tensor([[0, 1, 7], [100, 2047, -1]]))
    inv_freq = guarded(1.0 / 10000 ** (torch.arange(frequencies) / frequencies))
    kind = DTYPE_NAMES[dtype]
    operands = {"positions": positions, "inv_freq": inv_freq, **{name: result((2, 3, 2 * frequencies), kind) for name in ("out", "out1")}}
    run_kernel(specs.rotary_table(frequencies, dtype), operands, {"rows": 6})
    cosine, sine = ops.rotary_table(positions, inv_freq, 1.0, torch.float32)
    assert_close(operands["out"], cosine)
    assert_close(operands["out1"], sine)


@pytest.mark.parametrize(
    ("batch", "table_batch", "heads", "size", "dtype"), [(2, 2, 9, 64, "bf16"), (2, 1, 3, 80, "fp16"), (1, 1, 20, 32, "fp16")]
)
def test_rope_on_a_view_of_a_fused_matrix(batch: int, table_batch: int, heads: int, size: int, dtype: str) -> None:
    torch.manual_seed(0)
    fused = random(batch, 3, heads + 2, size, dtype=dtype)
    x = fused[:, :, 1 : heads + 1].transpose(1, 2)
    operands = {"x": x, "cos": random(table_batch, 3, size, dtype=dtype), "sin": random(table_batch, 3, size, dtype=dtype)}
    operands["out"] = result((batch, heads, 3, size), DTYPE_NAMES[dtype])
    run_kernel(specs.rope(heads, size, dtype), operands, {"batch": batch, "sequence": 3})
    assert_close(operands["out"], ops.rope(x.double(), operands["cos"].double(), operands["sin"].double()))


INDICES = torch.tensor([[3, 0, 18], [5, 19, -1]])


def test_embedding_never_reads_outside_its_table() -> None:
    operands = {"indices": guarded(INDICES), "weight": random(19, 70), "out": result((2, 3, 70), torch.bfloat16)}
    run_kernel(specs.embedding(19, 70), operands, {"rows": 6})
    assert torch.equal(operands["out"].flatten(0, 1)[:4], operands["weight"][[3, 0, 18, 5]])
    assert not bool(operands["out"].flatten(0, 1)[4:].any())


def test_gather_last_takes_the_row_of_the_greatest_position() -> None:
    positions = torch.full((3, 150), -1)
    positions[0] = torch.arange(150)
    positions[1, :7] = torch.arange(40, 47)
    positions[2, 140:] = torch.arange(10)
    operands = {"x": random(3, 150, 70), "positions": guarded(positions), "out": result((3, 1, 70), torch.bfloat16)}
    run_kernel(specs.gather_last(70), operands, {"batch": 3, "sequence": 150})
    assert torch.equal(operands["out"][:, 0], operands["x"][[0, 1, 2], [149, 6, 149]])


@pytest.mark.parametrize("form", ["int4 g32 asym fp16", "int4 g20 sym fp16", "int8 channel sym fp16", "int8 g64 asym fp32"])
def test_quantized_embedding(form: str) -> None:
    torch.manual_seed(0)
    weight_format = parse_format(form)
    packed = quantize(torch.randn(19, 71), weight_format)
    operands = {"indices": guarded(INDICES[0]), "codes": guarded(packed.codes), "scale": guarded(packed.scale)}
    operands |= {"out": result((3, 71), torch.bfloat16), **({} if packed.zero is None else {"zero": guarded(packed.zero)})}
    run_kernel(specs.embedding(19, 71, form), operands, {"rows": 3})
    table = dequantize(
        packed.codes, packed.scale, packed.zero, weight_format.element.bits, weight_format.granularity.group_size, 71, torch.bfloat16
    )
    assert torch.equal(operands["out"], table[INDICES[0]])


@pytest.mark.parametrize(("logits", "dtype"), [(49, "bf16"), (9000, "fp16")])
def test_argmax_takes_the_first_of_equals(logits: int, dtype: str) -> None:
    torch.manual_seed(0)
    values = random(3, logits, dtype=dtype)
    values[0, [logits - 1, 20, 33]] = 9.0
    values[1] = -torch.inf
    operands = {"logits": values, "out": result((3,), torch.int64)}
    run_kernel(specs.argmax(logits, dtype), operands, {"rows": 3})
    assert operands["out"].tolist() == [20, 0, int(values[2].argmax())]


@pytest.mark.parametrize(("logits", "count"), [(49, 5), (4100, 8), (64, 64)])
def test_topk(logits: int, count: int) -> None:
    torch.manual_seed(0)
    values = random(2, logits, dtype="fp32")
    values[1, 3:] = -torch.inf
    operands = {"logits": values, "out": result((2, count), torch.float32), "out1": result((2, count), torch.int64)}
    run_kernel(specs.topk(logits, count, "fp32"), operands, {"rows": 2})
    order = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(operands["out1"], order.indices[:, :count])
    assert torch.equal(operands["out"][0], order.values[0, :count])
