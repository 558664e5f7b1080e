"""Codes of b bits as bytes: every row a stream of bits, low bits first.

For 4 bits, byte j holds column 2j in its low and column 2j + 1 in its high nibble (the layout of onnxruntime's MatMulNBits).
For any width, 8 codes take b bytes; a row begins at a byte and its tail is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes uint8 [N, K] of `bits` bits into uint8 [N, ceil(K·b/8)]."""
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    per_word, word_bytes = _word(bits)
    padded = torch.nn.functional.pad(codes, (0, -columns % per_word)).view(rows, -1, per_word)
    dtype = torch.uint8 if word_bytes == 1 else torch.int64
    word = torch.zeros(padded.shape[:2], dtype=dtype, device=codes.device)
    for place in range(per_word):
        word |= padded[:, :, place].to(dtype) << (place * bits)
    if word_bytes > 1:
        word = torch.stack([(word >> (8 * place)) & 255 for place in range(word_bytes)], dim=-1).to(torch.uint8)
    return word.view(rows, -1)[:, : packed_bytes(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack`: uint8 [N, ceil(K·b/8)] to unsigned codes uint8 [N, K]."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    per_word, word_bytes = _word(bits)
    word = packed
    if word_bytes > 1:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % word_bytes)).view(rows, -1, word_bytes)
        places = torch.arange(word_bytes, device=packed.device) * 8
        word = (padded.to(torch.int64) << places).sum(-1)
    shifts = torch.arange(per_word, dtype=word.dtype, device=packed.device) * bits
    spread = (word.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return spread.to(torch.uint8).view(rows, -1)[:, :columns].contiguous()


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the shortest run that begins and ends at a byte."""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)
