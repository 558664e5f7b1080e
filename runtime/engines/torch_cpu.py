"""The default of `cpu-*`: torch's own CPU operators into buffers that stand, everything resolved before the first token.

int4 and int8 weights are multiplied as float weights made once at load. Torch's packed matmuls were measured beside them
(one thread, 1536 x 576, one row): float32 [K, N] 39 us; `_weight_int4pack_mm_for_cpu` 25 us with bfloat16 activations, at an
error of 3e-3 that a float32 graph does not allow, and 1314 us with float32; `_weight_int8pack_mm` 26 us and 590 us alike.

Float32 weights are kept in oneDNN's blocks. Beside `mm` on weights stored [K, N], both out of cache (1536 x 576): one row 137
against 139 us on one thread and 91 against 134 us on two; 128 rows 1118 against 2340 us and 574 against 1298 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.lowered import Step
from qcompile.ir.ops import masked_attention
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.engines.cpu_rows import ROW_KERNELS, Runs
from qcompile.runtime.engines.packed import INTEGER, packed_weight
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
        runs = Runs(shared=self.max_batch > 1)

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
    **ROW_KERNELS,
    "qcompile.cache_append_.default": cache_append,
    "qcompile.cache_attend.default": cache_attend,
}
"""Operators served otherwise than by their reference."""
