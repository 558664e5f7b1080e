"""The default of `cpu-*`: torch's own CPU operators into buffers that stand, everything resolved before the first token.

int4 and int8 weights are multiplied as float weights made once at load. Torch's packed matmuls were measured beside them
(one thread, 1536 x 576, one row): float32 [K, N] 39 us; `_weight_int4pack_mm_for_cpu` 25 us with bfloat16 activations, at an
error of 3e-3 that a float32 graph does not allow, and 1314 us with float32; `_weight_int8pack_mm` 26 us and 590 us alike.

Float32 weights are kept in oneDNN's blocks. Beside `mm` on weights stored [K, N], both out of cache (1536 x 576): one row 137
against 139 us on one thread and 91 against 134 us on two; 128 rows 1118 against 2340 us and 574 against 1298 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.lowered import Step
from qcompile.ir.ops import ACTIVATIONS, masked_attention
from qcompile.quant import activations
from qcompile.quant.hadamard import split_transform
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.engines.packed import FLOAT8, INTEGER, dequantized_rows, integer_matmul, packed_weight
from qcompile.runtime.engines.program import Call, Kernels, Operands, by_operator
from qcompile.runtime.engines.weights import Form, Readers, by_float_weight, prepared_weights
from qcompile.runtime.kv_cache import KVCache


class TorchCpuEngine(PlanEngine):
    """Fast torch on the CPU."""

    name = "torch_cpu"

    def prepared_constants(self) -> Sequence[tuple[str, Tensor]]:
        """Float weights; float32 ones in oneDNN's blocks, or stored [K, N] where something else reads them as they are.

        Weights of integer linears with one scale per row stay integers: torch's int8 matmul is the fastest of all.
        """
        return [(name, _packed(tensor, readers)) for name, tensor, readers in prepared_weights(self.contents, _form)]

    def kernels(self, cache: KVCache | None) -> Kernels:
        """A function of `KERNELS` where there is one, else the operator's reference."""
        del cache
        runs = Runs()

        def choose(step: Step, operands: Operands) -> Call | None:
            make = KERNELS.get(step.operator)
            return make(operands, runs) if make is not None else by_float_weight(step, operands)

        return choose


def _form(step: Step, shared: bool) -> Form:
    integers = step.operator == INTEGER and packed_weight(step).plain and not shared
    return Form.INTEGERS if integers else Form.FLOATS


def _packed(tensor: Tensor, readers: Readers) -> Tensor:
    """A linear's weight in the form that `_matmul` is fastest with; any other constant as it is."""
    if readers is Readers.OTHERS or tensor.dtype != torch.float32 or tensor.dim() != 2:
        return tensor
    if readers is Readers.LINEARS and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(tensor, 1)
        return packed
    return tensor.t().contiguous().t()


@dataclass(frozen=True)
class Run:
    """Tokens `start`..`stop` of a row of the batch, at consecutive positions from `first`."""

    row: int
    start: int
    stop: int
    first: int


class Runs:
    """The real tokens of the step that is running, read once for all layers."""

    def __init__(self) -> None:
        """Nothing is read yet."""
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
    del runs
    return _matmul(operands.args[0], operands.args[1], operands.args[2] if len(operands.args) > 2 else None, operands.out)


def quantized_linear(operands: Operands, runs: Runs) -> Call | None:
    """The same: the codes' buffer holds the float weights they stand for."""
    del runs
    if operands.args[1].dtype == torch.uint8:
        return None
    return _matmul(operands.args[0], operands.args[1], operands.args[4], operands.out)


def integer_linear(operands: Operands, runs: Runs) -> Call | None:
    """One int8 matmul where scales are per row; in groups a float matmul over what the codes stand for."""
    del runs
    exact = integer_matmul(operands)
    weight, bias = operands.args[3], operands.args[6]
    return exact if exact is not None else _rows_matmul(operands, weight, bias)


def float8_linear(operands: Operands, runs: Runs) -> Call | None:
    """A float matmul over what the codes stand for."""
    del runs
    return _rows_matmul(operands, operands.args[2], operands.args[4])


def _rows_matmul(operands: Operands, weight: Tensor, bias: Tensor | None) -> Call | None:
    if weight.dtype in (torch.uint8, torch.int8):
        return None
    x = torch.empty(operands.args[0].shape, dtype=weight.dtype)
    multiply = _matmul(x, weight, bias, operands.out)

    def run() -> None:
        x.copy_(dequantized_rows(operands))
        multiply()

    return run


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Call:
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
    codes, scale = outputs
    rotated = torch.empty_like(x) if size else x
    turn = hadamard(Operands([x, matrix, size], {}, [rotated], []), runs) if size else lambda: None

    def run() -> None:
        for made, place in zip(activations.quantize(rotated, *form), (codes, scale), strict=True):
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


def cache_append(operands: Operands, runs: Runs) -> Call:
    """Copy each run of tokens into its pages; the first layer reads where they go."""
    keys, values, k, v, page_table, positions = operands.args
    slow = by_operator("qcompile.cache_append_.default", operands)
    first = runs.claim()

    def run() -> None:
        if first:
            runs.read(positions, page_table)
        if not runs.regular:
            slow()
            return
        size = keys.shape[2]
        for part in runs.found:
            done = part.start
            while done < part.stop:
                place = part.first + done - part.start
                page, row = runs.pages[part.row][place // size], place % size
                count = min(size - row, part.stop - done)
                keys[page, :, row : row + count].copy_(k[part.row, :, done : done + count])
                values[page, :, row : row + count].copy_(v[part.row, :, done : done + count])
                done += count

    return run


def cache_attend(operands: Operands, runs: Runs) -> Call:
    """Each row over its own length: no padding is computed, nothing is masked that can be left out."""
    q, keys, values, _, _, scale, *rest = operands.args
    options: list[Any] = [0, 0.0, None]
    window, softcap, sinks = [*rest, *options[len(rest) :]]
    slow = by_operator("qcompile.cache_attend.default", operands)
    out = operands.out

    def run() -> None:
        if not runs.regular:
            slow()
            return
        if len(runs.found) < q.shape[0] or any(part.stop - part.start < q.shape[2] for part in runs.found):
            out.zero_()  # padding attends to nothing
        for part in runs.found:
            stop = part.first + part.stop - part.start
            least = max(0, part.first + 1 - window) if window else 0
            k, v = (_pages(cache, runs.pages[part.row], stop)[:, :, least:] for cache in (keys, values))
            rows = q[part.row : part.row + 1, :, part.start : part.stop]
            mixed = _attend(rows, k, v, part.first - least, window, scale, softcap, sinks)
            out[part.row : part.row + 1, :, part.start : part.stop].copy_(mixed)

    return run


def _pages(cache: Tensor, pages: list[int], stop: int) -> Tensor:
    """The first `stop` tokens [1, L, stop, D] of a row: a view of one page, or a copy of several."""
    size = cache.shape[2]
    if stop <= size:
        return cache[pages[0] : pages[0] + 1, :, :stop]
    used = cache[torch.tensor(pages[: -(-stop // size)])]
    return used.transpose(0, 1).reshape(1, cache.shape[1], -1, cache.shape[3])[:, :, :stop]


def _attend(q: Tensor, k: Tensor, v: Tensor, before: int, window: int, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Q [1, H, S, D] over k, v [1, L, T, D], of which `before` come before the first query."""
    count, total = q.shape[2], k.shape[2]
    keep = None
    if count > 1:
        row = torch.arange(before, before + count).unsqueeze(1)
        column = torch.arange(total).unsqueeze(0)
        keep = column <= row
        if window:
            keep &= column > row - window
    if softcap or sinks is not None or q.dtype != k.dtype:
        return masked_attention(q, k, v, keep, None, scale, softcap, sinks)
    causal = keep is not None and count == total and not window
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if causal else keep, is_causal=causal, scale=scale, enable_gqa=True
    )


KERNELS: dict[str, Callable[[Operands, Runs], Call | None]] = {
    "aten.linear.default": linear,
    "qcompile.quantized_linear.default": quantized_linear,
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
    "aten.add.Tensor": add,
    "qcompile.cache_append_.default": cache_append,
    "qcompile.cache_attend.default": cache_attend,
}
"""Operators served otherwise than by their reference."""
