"""Row-wise operators on torch's own CPU kernels: matmuls, norms, rotations, activations and what quantizes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.ops import ACTIVATIONS
from qcompile.quant import activations
from qcompile.quant.hadamard import split_transform
from qcompile.runtime.engines.packed import FLOAT8, INTEGER, QUANTIZED, dequantized_rows, integer_matmul
from qcompile.runtime.engines.program import Call, Operands


@dataclass(frozen=True)
class Run:
    """Tokens `start`..`stop` of a row of the batch, at consecutive positions from `first`."""

    row: int
    start: int
    stop: int
    first: int


LEAST_ROWS = 4
"""Rows of a product of which each is summed the same way however many there are: fewer go other ways in the libraries behind torch."""


class Runs:
    """The real tokens of the step that is running, read once for all layers."""

    def __init__(self, *, shared: bool = False) -> None:
        """Nothing is read yet; `shared` says that several sequences may run together, and none may notice."""
        self.shared = shared
        self.found: list[Run] = []
        self.pages: list[list[int]] = []
        self.regular = True
        self.claimed = False

    def claim(self) -> bool:
        """True for the first append of a program, which runs before every other use and so does the reading."""
        first, self.claimed = not self.claimed, True
        return first

    def read(self, positions: Tensor, page_table: Tensor) -> None:
        """Take in the positions [B, S] and the page table of this step."""
        self.pages = page_table.tolist()
        self.found, self.regular = [], True
        for row, places in enumerate(positions.tolist()):
            real = [index for index, place in enumerate(places) if place >= 0]
            if real:
                start, stop, first = real[0], real[-1] + 1, places[real[0]]
                self.regular &= places[start:stop] == list(range(first, first + stop - start))
                self.found.append(Run(row, start, stop, first))


def linear(operands: Operands, runs: Runs) -> Call:
    """`x Wᵀ + b` through one matmul over all rows."""
    return _matmul(operands.args[0], operands.args[1], operands.args[2] if len(operands.args) > 2 else None, operands.out, runs)


def quantized_linear(operands: Operands, runs: Runs) -> Call | None:
    """The same: the codes' buffer holds the float weights they stand for."""
    if operands.args[1].dtype == torch.uint8:
        return None
    return _matmul(operands.args[0], operands.args[1], operands.args[4], operands.out, runs)


def integer_linear(operands: Operands, runs: Runs) -> Call | None:
    """One int8 matmul where scales are per row; in groups a float matmul over what the codes stand for."""
    exact = integer_matmul(operands)
    weight, bias = operands.args[3], operands.args[6]
    return exact if exact is not None else _rows_matmul(operands, weight, bias, runs)


def float8_linear(operands: Operands, runs: Runs) -> Call | None:
    """A float matmul over what the codes stand for."""
    return _rows_matmul(operands, operands.args[2], operands.args[4], runs)


def _rows_matmul(operands: Operands, weight: Tensor, bias: Tensor | None, runs: Runs) -> Call | None:
    if weight.dtype in (torch.uint8, torch.int8):
        return None
    x = torch.empty(operands.args[0].shape, dtype=weight.dtype)
    multiply = _matmul(x, weight, bias, operands.out, runs)

    def run() -> None:
        x.copy_(dequantized_rows(operands))
        multiply()

    return run


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, runs: Runs) -> Call:
    rows = x.numel() // x.shape[-1]
    if runs.shared and rows < LEAST_ROWS:
        return _filled_up(x, weight, bias, out, rows)
    return _multiply(x, weight, bias, out)


def _filled_up(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, rows: int) -> Call:
    """With rows of zeros behind the real ones."""
    given, made = x.new_zeros(LEAST_ROWS, x.shape[-1]), out.new_empty(LEAST_ROWS, out.shape[-1])
    multiply, result = _multiply(given, weight, bias, made), out.view(-1, out.shape[-1])

    def run() -> None:
        given[:rows].copy_(x.reshape(rows, -1))
        multiply()
        result.copy_(made[:rows])

    return run


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Call:
    if weight.is_mkldnn:
        return lambda: out.copy_(torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    if not x.is_contiguous():
        return lambda: out.copy_(functional.linear(x, weight, bias))
    rows, result, turned = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1]), weight.t()
    if bias is None:
        return lambda: torch.mm(rows, turned, out=result)
    return lambda: torch.addmm(bias, rows, turned, out=result)


def embedding(operands: Operands, runs: Runs) -> Call:
    """Rows of the table."""
    del runs
    table, indices, out = operands.args[0], operands.args[1], operands.out
    result = out.view(-1, out.shape[-1])
    return lambda: torch.index_select(table, 0, indices.reshape(-1), out=result)


def rms_norm(operands: Operands, runs: Runs) -> Call:
    """One fused call; a gain of 1 + weight is added up once."""
    del runs
    return _norm(operands.args[0], *_norm_options(operands.args[1:]), operands.out)


def add_rms_norm(operands: Operands, runs: Runs) -> Call:
    """The sum into its buffer, then the norm of it."""
    del runs
    x, residual = operands.args[:2]
    total, normed = operands.outputs
    norm = _norm(total, *_norm_options(operands.args[2:]), normed)

    def run() -> None:
        torch.add(x, residual, out=total)
        norm()

    return run


def _norm_options(args: Sequence[object]) -> tuple[Tensor | None, float]:
    weight, eps, offset = (*args, 0.0)[:3]
    assert isinstance(eps, float)
    assert isinstance(offset, float | int)
    if not isinstance(weight, Tensor):
        return None, eps
    return (weight + offset if offset else weight), eps


def _norm(x: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> Call:
    shape = (x.shape[-1],)
    return lambda: out.copy_(functional.rms_norm(x, shape, weight, eps))


def norm_quantize(operands: Operands, runs: Runs) -> Call | None:
    """The fused norm into a buffer of its own, then rotation and quantize."""
    x, weight, eps, offset, *options = operands.args
    normed = torch.empty_like(x)
    norm = _norm(x, *_norm_options((weight, eps, offset)), normed)
    return _in_order(norm, _rotate_quantize(normed, options, operands.outputs, runs))


def add_norm_quantize(operands: Operands, runs: Runs) -> Call | None:
    """The sum into its buffer, then as `norm_quantize`."""
    x, residual, weight, eps, offset, *options = operands.args
    total = operands.outputs[0]
    normed = torch.empty_like(x)
    norm = _norm(total, *_norm_options((weight, eps, offset)), normed)
    return _in_order(lambda: torch.add(x, residual, out=total), norm, _rotate_quantize(normed, options, operands.outputs[1:], runs))


def gated_quantize(operands: Operands, runs: Runs) -> Call | None:
    """The gated activation into a buffer of its own, then rotation and quantize."""
    gate, up, name, *options = operands.args
    hidden = torch.empty_like(gate)
    gated = gated_activation(Operands([gate, up, name], {}, [hidden], []), runs)
    return _in_order(gated, _rotate_quantize(hidden, options, operands.outputs, runs))


def hadamard_quantize(operands: Operands, runs: Runs) -> Call | None:
    """Rotation, then quantize."""
    return _rotate_quantize(operands.args[0], operands.args[1:], operands.outputs, runs)


def _rotate_quantize(x: Tensor, options: Sequence[Any], outputs: Sequence[Tensor], runs: Runs) -> Call | None:
    matrix, size, *form = options
    quantize = activations.quantize if len(outputs) == 2 else activations.quantize_asymmetric
    rotated = torch.empty_like(x) if size else x
    turn = hadamard(Operands([x, matrix, size], {}, [rotated], []), runs) if size else lambda: None

    def run() -> None:
        for made, place in zip(quantize(rotated, *form), outputs, strict=True):
            place.copy_(made)

    return _in_order(turn, run)


def _in_order(*calls: Call | None) -> Call | None:
    """One call that makes these one after the other; None if any of them is missing."""
    known = [call for call in calls if call is not None]
    if len(known) < len(calls):
        return None

    def run() -> None:
        for call in known:
            call()

    return run


def rope(operands: Operands, runs: Runs) -> Call:
    """Three calls over both halves in place of a concatenation."""
    del runs
    x, cos, sin = operands.args
    out, half = operands.out, x.shape[-1] // 2
    wide, fine = cos.unsqueeze(1), sin.unsqueeze(1)
    low, high = out[..., :half], out[..., half:]
    x_low, x_high, sin_low, sin_high = x[..., :half], x[..., half:], fine[..., :half], fine[..., half:]

    def run() -> None:
        torch.mul(x, wide, out=out)
        low.addcmul_(x_high, sin_low, value=-1)
        high.addcmul_(x_low, sin_high)

    return run


def gated_activation(operands: Operands, runs: Runs) -> Call:
    """The activation into its buffer, times the other branch."""
    del runs
    gate, up, name = operands.args
    out = operands.out
    if name == "silu":
        return lambda: torch.ops.aten.silu.out(gate, out=out).mul_(up)
    activation = ACTIVATIONS[name]
    return lambda: torch.mul(activation(gate), up, out=out)


def hadamard(operands: Operands, runs: Runs) -> Call | None:
    """Two small matrix products, their factors made once."""
    del runs
    x, matrix, size = operands.args
    out = operands.out
    if x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        return None
    left, right = (factor.to(x.dtype) for factor in split_transform(matrix, size))
    shape = (-1, left.shape[0], right.shape[0])
    grid, result = x.view(shape), out.view(shape)
    return lambda: result.copy_(left @ (grid @ right))


def add(operands: Operands, runs: Runs) -> Call | None:
    """Plain sums of tensors."""
    del runs
    x, y, out = operands.args[0], operands.args[1], operands.out
    if operands.kwargs or not isinstance(y, Tensor) or x.dtype != out.dtype or y.dtype != out.dtype:
        return None
    return lambda: torch.add(x, y, out=out)


ROW_KERNELS: dict[str, Callable[[Operands, Runs], Call | None]] = {
    "aten.linear.default": linear,
    QUANTIZED: quantized_linear,
    INTEGER: integer_linear,
    FLOAT8: float8_linear,
    "aten.embedding.default": embedding,
    "qcompile.rms_norm.default": rms_norm,
    "qcompile.add_rms_norm.default": add_rms_norm,
    "qcompile.rope.default": rope,
    "qcompile.gated_activation.default": gated_activation,
    "qcompile.hadamard.default": hadamard,
    "qcompile.hadamard_quantize.default": hadamard_quantize,
    "qcompile.norm_quantize.default": norm_quantize,
    "qcompile.add_norm_quantize.default": add_norm_quantize,
    "qcompile.gated_quantize.default": gated_quantize,
    "qcompile.hadamard_quantize_asym.default": hadamard_quantize,
    "qcompile.norm_quantize_asym.default": norm_quantize,
    "qcompile.add_norm_quantize_asym.default": add_norm_quantize,
    "qcompile.gated_quantize_asym.default": gated_quantize,
    "aten.add.Tensor": add,
}
"""Operators that compute each row by itself."""
