"""The `qcompile::hadamard` operator: a rotation of activations that runs, because no weight before them can absorb it."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.ops import define, working_dtype
from qcompile.quant.hadamard import fast_hadamard


def _fake_hadamard(x: Tensor, matrix: Tensor | None, size: int) -> Tensor:
    del matrix, size
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("hadamard(Tensor x, Tensor? matrix, int size) -> Tensor", _fake_hadamard)
def hadamard(x: Tensor, matrix: Tensor | None, size: int) -> Tensor:
    """`(M ⊗ S_k/sqrt(2^k)) v` for every run v of `size` channels along the last axis of x [..., blocks·size], rounded once.

    size = m·2^k; matrix M [m, m] is orthogonal (scaled already), None for m = 1; S_k is Sylvester's ±1 matrix of order 2^k.
    """
    return fast_hadamard(x.to(working_dtype(x.dtype)), matrix, size).to(x.dtype)
