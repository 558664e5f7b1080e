"""Other 4-bit linears as calls without arguments: built for a shape, imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[], object]


def _weights(rows: int, columns: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random codes [N, K], scales and zero points [N, G], and one token [1, K]; speed does not depend on the values."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = torch.rand(rows, columns // group, dtype=torch.bfloat16, device="cuda") * 0.01
    return codes, scales, torch.full_like(scales, 8.0), torch.randn(1, columns, dtype=torch.bfloat16, device="cuda")


def torch_int4pack(rows: int, columns: int, group: int) -> Call:
    """`torch._weight_int4pack_mm` (tinygemm): K has to be a multiple of 16 times the inner tiles."""
    codes, scales, zeros, x = _weights(rows, columns, group)
    tiles = next((count for count in (8, 4, 2) if columns % (16 * count) == 0), 8)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], tiles)
    scales_and_zeros = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()
    return lambda: torch._weight_int4pack_mm(x, packed, group, scales_and_zeros)


def gemlite(rows: int, columns: int, group: int) -> Call:
    """Gemlite's Triton kernels, which choose their own tiling on first use."""
    from gemlite.core import DType, GemLiteLinear

    codes, scales, zeros, x = _weights(rows, columns, group)
    linear = GemLiteLinear(4, group_size=group, in_features=columns, out_features=rows, input_dtype=DType.BF16, output_dtype=DType.BF16)
    linear.pack(codes, scales, zeros, None)
    return lambda: linear(x)


PEERS: dict[str, Callable[[int, int, int], Call]] = {"torch_int4pack": torch_int4pack, "gemlite": gemlite}
"""Name in the results -> builder for N rows, K columns and a group size."""
